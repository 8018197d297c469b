"""The demo's files are those of topology/pair, as long as its ports are free."""

import socket
from pathlib import Path

from p2pkv.config import NodeConfig
from p2pkv.demo.setting import Ports, free_ports, instance_yaml, tcp_instance_yaml, write_yamls

PAIR = Path(__file__).parents[2] / "topology" / "pair"


def test_with_the_usual_ports_the_files_are_topology_pair() -> None:
    for index in (0, 1):
        assert instance_yaml(index, Ports()) == (PAIR / f"instance{index + 1}.yaml").read_text()


def test_a_port_that_is_taken_is_replaced_and_told() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 9000))
            taken.listen()
        except OSError:
            pass  # somebody else has it, which is as good
        ports, replaced = free_ports()
    assert replaced[9000] == ports.shared != 9000


def test_other_ports_reach_the_nodes(tmp_path: Path) -> None:
    ports = Ports(workers=(7002, 7003), transfers=(7004, 7005), shared=7000, monitor=7001)
    first, second = (NodeConfig.from_yaml(path, environ={}) for path in write_yamls(tmp_path, ports))
    assert (first.lmcache_worker_port, second.lmcache_worker_port) == (7002, 7003)
    assert first.controller_http_url.port == second.controller_http_url.port == 7000
    assert second.distributed_url is not None
    assert second.distributed_url.port == 7005


def test_the_third_instance_never_passes_memory_on(tmp_path: Path) -> None:
    path = tmp_path / "instance3.yaml"
    path.write_text(tcp_instance_yaml(Ports(tcp_worker=7006, shared=7000)))
    config = NodeConfig.from_yaml(path, environ={})
    assert not config.same_host_handoff
    assert (config.lmcache_worker_port, config.controller_http_url.port) == (7006, 7000)

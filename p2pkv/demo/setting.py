"""Where the demo takes place: a folder of its own with the instances' files, a runtime directory, and free ports."""

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

INSTANCES = ("lmcache_instance_1", "lmcache_instance_2")
TCP_INSTANCE = "lmcache_instance_3"
"""A third one, which takes part as an instance on another host would: all that it sends and gets goes over TCP."""

_YAML = """\
# instance{number}.yaml
chunk_size: 256
local_cpu: True
max_local_cpu_size: 5
enable_controller: True
lmcache_instance_id: "{instance}"
controller_url: "localhost:{monitor}"
lmcache_worker_port: {worker}
distributed_url: "localhost:{transfer}"
"""


@dataclass(frozen=True, slots=True)
class Ports:
    """Every port of the walk-through, one number for each instance or one for both."""

    engines: tuple[int, int] = (8000, 8001)
    workers: tuple[int, int] = (8002, 8003)
    transfers: tuple[int, int] = (8004, 8005)
    tcp_worker: int = 8006
    tcp_transfer: int = 8007
    shared: int = 9000
    monitor: int = 9001


def free_ports() -> tuple[Ports, dict[int, int]]:
    """The usual ports, others for those that are taken, and which stand for which."""
    usual = Ports()
    replaced: dict[int, int] = {}

    def pick(port: int) -> int:
        picked = _hold(port, held)
        if picked != port:
            replaced[port] = picked
        return picked

    with ExitStack() as held:
        ports = Ports(
            engines=(pick(usual.engines[0]), pick(usual.engines[1])),
            workers=(pick(usual.workers[0]), pick(usual.workers[1])),
            transfers=(pick(usual.transfers[0]), pick(usual.transfers[1])),
            tcp_worker=pick(usual.tcp_worker),
            tcp_transfer=pick(usual.tcp_transfer),
            shared=pick(usual.shared),
            monitor=pick(usual.monitor),
        )
    return ports, replaced


def _hold(port: int, held: ExitStack) -> int:
    """Bind `port`, or any free one, until `held` ends, so that no other is given the same."""
    for candidate in (port, 0):
        listener = held.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", candidate))
            listener.listen()
        except OSError:
            if candidate == 0:
                raise
        else:
            break
    return int(listener.getsockname()[1])


def instance_yaml(index: int, ports: Ports) -> str:
    """The file of instance `index` (0 or 1): with the usual ports the very text of the seed and of topology/pair."""
    return _yaml(index + 1, INSTANCES[index], worker=ports.workers[index], transfer=ports.transfers[index], ports=ports)


def tcp_instance_yaml(ports: Ports) -> str:
    """The file of the third instance."""
    text = _yaml(3, TCP_INSTANCE, worker=ports.tcp_worker, transfer=ports.tcp_transfer, ports=ports)
    return f"{text}same_host_handoff: False\n"


def _yaml(number: int, instance: str, *, worker: int, transfer: int, ports: Ports) -> str:
    text = _YAML.format(number=number, instance=instance, monitor=ports.monitor, worker=worker, transfer=transfer)
    return text if ports.shared == Ports().shared else f'{text}controller_http_url: "localhost:{ports.shared}"\n'


def write_yamls(folder: Path, ports: Ports) -> tuple[Path, Path]:
    """Write both instances' files into `folder`."""
    paths = (folder / "instance1.yaml", folder / "instance2.yaml")
    for index, path in enumerate(paths):
        path.write_text(instance_yaml(index, ports), encoding="utf-8")
    return paths

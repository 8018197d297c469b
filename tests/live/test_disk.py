"""Chunks on disk, with real nodes: they outlive a kill, and come back bit by bit wherever they are moved."""

from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import torch

from p2pkv.config import NodeConfig
from p2pkv.engines import EngineCache
from tests.live.command_line import COMMAND, LAYOUT
from tests.live.doors import CPU, DISK, Cluster, NodeProcess, open_cluster, states, until

pytestmark = pytest.mark.live

TOKENS = list(range(1000, 1010))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        yield cluster


def disk_of(folder: Path, name: str, gib: str = "0.001") -> tuple[str, ...]:
    return f"local_disk: file://{folder / name}-disk/", f"max_local_disk_size: {gib}"


@pytest.fixture(params=["handoff", "tcp"])
def pair(cluster: Cluster, request: pytest.FixtureRequest) -> list[NodeProcess]:
    """Two nodes with a disk each, on one host or as on two."""
    lane = () if request.param == "handoff" else ("same_host_handoff: false",)
    return started(cluster, *lane)


def started(cluster: Cluster, *lines: str) -> list[NodeProcess]:
    a, b = cluster.start(a=(*disk_of(cluster.folder, "a"), *lines), b=(*disk_of(cluster.folder, "b"), *lines))
    until(lambda: states(a) == states(b) == {"a": "alive", "b": "alive"})
    return [a, b]


def store(node: NodeProcess) -> torch.Tensor:
    kv = torch.rand(LAYOUT.shape(len(TOKENS)))
    with EngineCache.attach(NodeConfig.from_yaml(node.config), model="tiny", layout=LAYOUT) as cache:
        assert cache.store(TOKENS, kv) == len(TOKENS)
    return kv


def retrieve(node: NodeProcess) -> torch.Tensor | None:
    with EngineCache.attach(NodeConfig.from_yaml(node.config), model="tiny", layout=LAYOUT) as cache:
        return cache.retrieve(TOKENS)[1]


def move(via: NodeProcess, old: tuple[str, str], new: tuple[str, str], **more: object) -> dict[str, Any]:
    fields = {"tokens": TOKENS, **more}
    reply: dict[str, Any] = via.post("/move", old_position=old, new_position=new, wait_s=10, **fields).json()
    event: dict[str, Any] = via.get(f"/events/{reply['event_id']}").json()
    return event


def lookup(node: NodeProcess) -> dict[str, list[list[Any]]]:
    layout: dict[str, list[list[Any]]] = node.post("/full_lookup", tokens=TOKENS).json()["layout_info"]
    return layout


def generation(seen_by: NodeProcess) -> int:
    """Of a living a, 0 while there is none."""
    members = seen_by.get("/members").json()["members"]
    return next((each["generation"] for each in members if each["instance"] == "a" and each["state"] == "alive"), 0)


def files(cluster: Cluster, name: str) -> int:
    return len(list((cluster.folder / f"{name}-disk").glob("*.safetensors")))


def restart(cluster: Cluster, node: NodeProcess) -> NodeProcess:
    process = Popen([*COMMAND, "node", "--config", str(node.config)], stdout=PIPE, text=True)
    cluster.adopt(process.kill)
    again = NodeProcess(node.config, process)
    cluster.adopt(again.close)
    return again


def test_chunks_on_disk_outlive_a_kill_and_move_on_bit_by_bit(cluster: Cluster, pair: list[NodeProcess]) -> None:
    a, b = pair
    kv = store(a)
    event = move(b, ("a", CPU), ("a", DISK))
    assert (event["state"], event["lane"], event["num_tokens"]) == ("done", "local", len(TOKENS)), event
    until(lambda: lookup(b) == {"a": [[DISK, len(TOKENS)]]})
    killed = generation(b)
    a.kill()
    restart(cluster, a)
    until(lambda: generation(b) > killed and lookup(b) == {"a": [[DISK, len(TOKENS)]]}, within_s=10)
    moved = move(b, ("a", DISK), ("b", CPU))
    assert moved["state"] == "done", moved
    assert moved["lane"] in ("handoff", "tcp")
    until(lambda: files(cluster, "a") == 0)
    found = retrieve(b)
    assert found is not None
    assert torch.equal(found, kv)


def test_copies_and_move_all_reach_another_disk_and_come_back(cluster: Cluster, pair: list[NodeProcess]) -> None:
    a, b = pair
    kv = store(a)
    assert move(a, ("a", CPU), ("b", DISK), copy=True)["state"] == "done"
    until(lambda: lookup(a) == lookup(b) == {"a": [[CPU, len(TOKENS)]], "b": [[DISK, len(TOKENS)]]})
    assert move(b, ("b", DISK), ("a", DISK), tokens=[], all=True)["state"] == "done"
    until(lambda: files(cluster, "b") == 0)
    assert a.post("/clear", instance_id="a", location=CPU).json()["num_tokens"] == len(TOKENS)
    assert move(a, ("a", DISK), ("a", CPU))["lane"] == "local"
    found = retrieve(a)
    assert found is not None
    assert torch.equal(found, kv)
    assert files(cluster, "a") == 0


def test_pins_and_clear_know_the_disk(cluster: Cluster) -> None:
    (a,) = cluster.start(a=disk_of(cluster.folder, "a"))
    store(a)
    move(a, ("a", CPU), ("a", DISK))
    assert a.post("/pin", instance_id="a", location=DISK, tokens=TOKENS).json()["num_tokens"] == len(TOKENS)
    assert a.post("/clear", instance_id="a", location=DISK).json()["num_tokens"] == 0
    assert a.post("/unpin", instance_id="a", location=DISK, tokens=TOKENS).json()["num_tokens"] == len(TOKENS)
    assert a.post("/clear", instance_id="a", location=DISK).json()["num_tokens"] == len(TOKENS)
    until(lambda: files(cluster, "a") == 0)
    assert set(a.get("/members").json()["members"][0]["locations"]) == {CPU, DISK}


def test_a_damaged_file_is_never_given_out_and_is_told_of(cluster: Cluster) -> None:
    a, b = started(cluster)
    store(a)
    move(a, ("a", CPU), ("a", DISK))
    path = next((cluster.folder / "a-disk").glob("*.safetensors"))
    *rest, last = path.read_bytes()
    path.write_bytes(bytes([*rest, last ^ 1]))
    event = move(a, ("a", DISK), ("b", CPU))
    assert event["state"] in ("partial", "failed")
    assert event["chunks"]["failed"] >= 1
    assert (path.parent / "set-aside" / path.name).exists()
    assert "set aside" in (cluster.folder / "a.log").read_text()
    assert states(b) == {"a": "alive", "b": "alive"}


def test_a_directory_has_one_node_and_a_second_one_says_so(cluster: Cluster) -> None:
    cluster.start(a=disk_of(cluster.folder, "a"))
    with pytest.raises(AssertionError):
        cluster.start(b=disk_of(cluster.folder, "a"))
    assert "another node uses" in (cluster.folder / "b.log").read_text()


def test_without_room_on_disk_a_move_fails_by_name_and_nothing_is_lost(cluster: Cluster) -> None:
    (a,) = cluster.start(a=disk_of(cluster.folder, "a", gib="0.00001"))
    kv = store(a)
    event = move(a, ("a", CPU), ("a", DISK))
    assert (event["state"], event["error"]["error"]) == ("failed", "store_full")
    found = retrieve(a)
    assert found is not None
    assert torch.equal(found, kv)

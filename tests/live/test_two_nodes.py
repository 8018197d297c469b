"""Whole nodes over real sockets: they find each other, move chunks, notice a death, and refuse a name that is taken."""

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from p2pkv import NodeConfig, open_node
from p2pkv.core.events import MoveRequested
from p2pkv.core.ids import Location, Position
from p2pkv.core.keys import Identity
from p2pkv.core.records import EventRecord, EventState, Lane, MemberState, Operation, Selection
from p2pkv.errors import ConfigError, ErrorCode, InstanceIdInUseError
from p2pkv.net.descriptors import receive_frame, send_frame
from p2pkv.node import Node
from p2pkv.rendezvous import NodeCard, claim, living_cards, place_of, publish
from p2pkv.wire.engine import (
    ENGINE_PROTOCOL_VERSION,
    Attach,
    Attached,
    Commit,
    EngineReply,
    EngineRequest,
    Lent,
    LookupReply,
    LookupRequest,
    Retrieved,
    RetrieveRequest,
    Stored,
    StoreRequest,
    reply_codec,
    request_codec,
)
from p2pkv.wire.frames import Frame

pytestmark = pytest.mark.live

CHUNK_TOKENS = 4
ATTACH = Attach(
    ENGINE_PROTOCOL_VERSION,
    model="tiny",
    weights=None,
    dtype="float32",
    layers=2,
    planes=2,
    kv_heads=2,
    head_dim=8,
    world_size=1,
    worker=0,
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def config_of(instance: str, **more: object) -> NodeConfig:
    keys = {"lmcache_instance_id": instance, "lmcache_worker_port": free_port(), "chunk_size": CHUNK_TOKENS}
    return NodeConfig.model_validate({**keys, "controller_http_url": f"localhost:{free_port()}", **more})


def tokens_of(*token_ids: int) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in token_ids)


async def until(is_true: Callable[[], bool], within_s: float = 3.0) -> None:
    with trio.fail_after(within_s):
        while not is_true():  # noqa: ASYNC110 - a whole node has no event for each of its facts
            await trio.sleep(0.005)


def state_of(node: Node, instance: str) -> MemberState | None:
    states = {member.instance: member.state for member in node.driver.machine.members()}
    return states.get(instance)


class Engine:
    """A worker that stores chunks full of its own letter."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket

    async def ask(self, request: EngineRequest) -> tuple[EngineReply, Frame]:
        await send_frame(self._socket, request_codec().encode(request))
        frame = await receive_frame(self._socket)
        assert frame is not None
        return reply_codec().decode(frame.payload), frame

    async def store(self, tokens: bytes, letter: bytes) -> int:
        token, held = 0, 0
        while token < len(tokens) // 4:
            lent, frame = await self.ask(StoreRequest(Identity(), tokens, first_token=token))
            assert isinstance(lent, Lent)
            with frame:
                for shard, descriptor in zip(lent.shards, frame.descriptors, strict=True):
                    os.pwrite(descriptor, letter * max(shard.nbytes, 4096), 0)
            stored, _ = await self.ask(Commit(lent.lease))
            assert isinstance(stored, Stored)
            token, held = lent.next_token, stored.held_tokens
        return held

    async def lookup(self, tokens: bytes) -> int:
        reply, _ = await self.ask(LookupRequest(Identity(), tokens))
        assert isinstance(reply, LookupReply)
        return reply.num_tokens

    async def retrieve(self, tokens: bytes) -> list[bytes]:
        reply, frame = await self.ask(RetrieveRequest(Identity(), tokens, first_token=0))
        assert isinstance(reply, Retrieved)
        with frame:
            return [os.pread(descriptor, 1, 0) for descriptor in frame.descriptors]


class Pair:
    """Two nodes of one cluster, and an engine at each."""

    def __init__(self, a: Node, b: Node, engine_a: Engine, engine_b: Engine) -> None:
        self.a, self.b, self.engine_a, self.engine_b = a, b, engine_a, engine_b

    async def move(
        self, tokens: bytes, selection: Selection = Selection.TOKENS, via: Node | None = None, *, old: str = "a", new: str = "b"
    ) -> EventRecord:
        node = via or self.a
        make = partial(
            MoveRequested,
            old_position=Position(old, Location.LOCAL_CPU),
            new_position=Position(new, Location.LOCAL_CPU),
            operation=Operation.MOVE,
            selection=selection,
            tokens=tokens,
            identity=Identity(),
            model=None,
        )
        with trio.fail_after(5):
            event = await node.driver.request(make)
            assert isinstance(event, EventRecord)
            return await node.driver.wait_end(event.event_id)


@pytest.fixture
def environ(runtime_dir: Path) -> dict[str, str]:
    return {"P2PKV_RUNTIME_DIR": str(runtime_dir)}


async def attach(stack: AsyncExitStack, runtime_dir: Path, instance: str) -> Engine:
    path = place_of(runtime_dir, "p2pkv", instance).engine_socket
    engine = Engine(await stack.enter_async_context(await trio.open_unix_socket(str(path))))
    reply, _ = await engine.ask(ATTACH)
    assert isinstance(reply, Attached)
    return engine


@asynccontextmanager
async def pair_of(runtime_dir: Path, *configs: NodeConfig) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        environ = {"P2PKV_RUNTIME_DIR": str(runtime_dir)}
        a, b = [await stack.enter_async_context(open_node(config, environ)) for config in configs]
        await until(lambda: state_of(a, "b") is MemberState.ALIVE and state_of(b, "a") is MemberState.ALIVE)
        yield Pair(a, b, await attach(stack, runtime_dir, "a"), await attach(stack, runtime_dir, "b"))


@pytest.fixture
async def pair(runtime_dir: Path) -> AsyncIterator[Pair]:
    async with pair_of(runtime_dir, config_of("a"), config_of("b")) as pair:
        yield pair


async def test_a_move_brings_the_bytes_to_the_other_instance(pair: Pair) -> None:
    tokens = tokens_of(*range(10))  # two full chunks and a partly filled one
    assert await pair.engine_a.store(tokens, b"A") == 10
    event = await pair.move(tokens)
    assert (event.state, event.num_tokens, event.chunks.moved, event.lane) == (EventState.DONE, 10, 3, Lane.HANDOFF)
    assert await pair.engine_a.lookup(tokens) == 0
    assert await pair.engine_b.lookup(tokens) == 10
    assert await pair.engine_b.retrieve(tokens) == [b"A"] * 3
    await until(lambda: [held.instance for held in pair.a.driver.machine.lookup(tokens, None, Identity())] == ["b"])


async def test_either_end_coordinates_and_knows_the_event(pair: Pair) -> None:
    tokens = tokens_of(1, 2, 3)
    await pair.engine_a.store(tokens, b"A")
    event = await pair.move(tokens, via=pair.b)
    assert event.state is EventState.DONE
    await until(lambda: pair.a.driver.machine.event(event.event_id) is not None)


async def test_hundreds_of_chunks_move_in_one_event(pair: Pair) -> None:
    for first in range(0, 4000, 1000):
        tokens = tokens_of(*range(first, first + 1000))
        assert await pair.engine_a.store(tokens, b"A") == 1000
    event = await pair.move(b"", Selection.ALL)
    assert (event.state, event.chunks.moved) == (EventState.DONE, 1000)


@pytest.mark.parametrize("without", ["a", "b"])
async def test_where_one_end_passes_no_descriptors_the_bytes_go_over_tcp(runtime_dir: Path, without: str) -> None:
    async with pair_of(runtime_dir, *(config_of(name, same_host_handoff=name != without) for name in "ab")) as pair:
        tokens = tokens_of(*range(10))
        await pair.engine_a.store(tokens, b"A")
        event = await pair.move(tokens)
        assert (event.state, event.chunks.moved, event.lane) == (EventState.DONE, 3, Lane.TCP)
        assert await pair.engine_a.lookup(tokens) == 0
        assert await pair.engine_b.retrieve(tokens) == [b"A"] * 3


async def test_a_handoff_that_is_refused_becomes_a_transfer_and_what_came_is_handed_on(pair: Pair, runtime_dir: Path) -> None:
    tokens = tokens_of(*range(10))
    await pair.engine_a.store(tokens, b"A")
    place_of(runtime_dir, "p2pkv", "a").lane_socket.unlink()
    event = await pair.move(tokens)
    assert (event.state, event.chunks.moved, event.lane) == (EventState.DONE, 3, Lane.TCP)
    back = await pair.move(tokens, old="b", new="a")
    assert (back.state, back.chunks.moved, back.lane) == (EventState.DONE, 3, Lane.HANDOFF)
    assert await pair.engine_a.retrieve(tokens) == [b"A"] * 3


async def test_a_full_target_refuses_before_a_byte_moves(runtime_dir: Path) -> None:
    small = config_of("b", max_local_cpu_size=8192 / 2**30)
    async with pair_of(runtime_dir, config_of("a"), small) as pair:
        tokens = tokens_of(*range(12))
        await pair.engine_a.store(tokens, b"A")
        event = await pair.move(tokens)
        assert event.state is EventState.FAILED
        assert event.error is not None
        assert event.error.code is ErrorCode.STORE_FULL
        assert await pair.engine_a.lookup(tokens) == 12
        assert await pair.engine_b.lookup(tokens) == 0


async def test_leaving_is_told_and_is_not_death(runtime_dir: Path, environ: dict[str, str]) -> None:
    async with open_node(config_of("a"), environ) as a:
        async with open_node(config_of("b"), environ):
            await until(lambda: state_of(a, "b") is MemberState.ALIVE)
            started = trio.current_time()
        assert trio.current_time() - started < 1
        await until(lambda: state_of(a, "b") is MemberState.LEFT)


async def test_a_node_that_comes_back_is_a_later_generation(runtime_dir: Path, environ: dict[str, str]) -> None:
    async with open_node(config_of("a"), environ) as a:
        generations = []
        for _ in range(2):
            async with open_node(config_of("b"), environ) as b:
                await until(lambda: state_of(a, "b") is MemberState.ALIVE)
                generations.append(b.driver.machine.config.generation)
            await until(lambda: state_of(a, "b") is MemberState.LEFT)
        assert generations[0] < generations[1]


async def test_contacts_join_nodes_that_share_no_directory(tmp_path: Path, runtime_dir: Path) -> None:
    here, there = ({"P2PKV_RUNTIME_DIR": str(runtime_dir / name)} for name in ("1", "2"))
    first = config_of("a")
    async with open_node(first, here) as a:
        contact = f"127.0.0.1:{first.lmcache_worker_port}"
        async with open_node(config_of("b", contacts=[contact]), there) as b:
            await until(lambda: state_of(a, "b") is MemberState.ALIVE and state_of(b, "a") is MemberState.ALIVE)


async def test_a_name_in_use_on_this_host_is_refused_by_name(environ: dict[str, str]) -> None:
    async with open_node(config_of("a"), environ):
        with pytest.raises(InstanceIdInUseError, match="'a'"):
            async with open_node(config_of("a"), environ):
                raise AssertionError("it must not start")


async def test_a_name_in_use_in_the_cluster_stops_the_newcomer(runtime_dir: Path) -> None:
    here, there = ({"P2PKV_RUNTIME_DIR": str(runtime_dir / name)} for name in ("1", "2"))
    first = config_of("a")
    async with open_node(config_of("c"), here) as c, open_node(first, here):
        await until(lambda: state_of(c, "a") is MemberState.ALIVE)
        contact = f"127.0.0.1:{first.lmcache_worker_port}"
        with pytest.raises(InstanceIdInUseError, match="'a'"), trio.fail_after(5):
            async with open_node(config_of("a", contacts=[contact]), there):
                await trio.sleep_forever()
        assert state_of(c, "a") is MemberState.ALIVE


@pytest.mark.parametrize("key", ["lmcache_worker_port", "http_port", "distributed_url"])
async def test_a_port_in_use_is_an_error_that_names_port_and_key(environ: dict[str, str], key: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        value = f"localhost:{port}" if key == "distributed_url" else port
        with pytest.raises(ConfigError, match=f"{key}: port {port} "):
            async with open_node(config_of("a", **{key: value}), environ):
                raise AssertionError("it must not start")


async def test_a_node_that_keeps_to_itself_is_not_found(runtime_dir: Path, environ: dict[str, str]) -> None:
    async with open_node(config_of("a", enable_controller=False), environ) as a:
        assert a.addresses.shared is None
        assert living_cards(runtime_dir, "p2pkv") == []


async def test_a_card_that_makes_no_sense_stops_nobody(runtime_dir: Path, environ: dict[str, str]) -> None:
    strange = place_of(runtime_dir, "p2pkv", "strange")
    with claim(strange):
        publish(strange, NodeCard("strange", 1, os.getpid(), ws="nowhere", http="", transfer="", shared=None, rendezvous=None))
        async with open_node(config_of("a"), environ):
            pass


async def test_a_body_that_fails_still_leaves(runtime_dir: Path, environ: dict[str, str]) -> None:
    with pytest.RaisesGroup(LookupError):
        async with open_node(config_of("a"), environ):
            raise LookupError("of the body")
    assert living_cards(runtime_dir, "p2pkv") == []


async def test_a_killed_node_is_dead_within_five_seconds(runtime_dir: Path, environ: dict[str, str]) -> None:
    keys = {"lmcache_instance_id": "b", "lmcache_worker_port": free_port(), "controller_http_url": f"localhost:{free_port()}"}
    yaml = runtime_dir / "b.yaml"
    yaml.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    command = [sys.executable, "-m", "p2pkv", "node", "--config", str(yaml)]
    async with open_node(config_of("a"), environ) as a, trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, env={**os.environ, **environ}, check=False, stdout=None)
        process: trio.Process = await nursery.start(run)
        await until(lambda: state_of(a, "b") is MemberState.ALIVE, within_s=10)
        process.send_signal(signal.SIGKILL)
        await until(lambda: state_of(a, "b") is MemberState.DEAD, within_s=5)

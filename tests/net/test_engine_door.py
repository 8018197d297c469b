"""The engine socket with the real core and store behind it, and clients of every kind in front."""

import mmap
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TypeVar

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pkv.core import effects
from p2pkv.core.config import MachineConfig
from p2pkv.core.ids import Address, LinkId, Location
from p2pkv.core.keys import ChunkKey, Identity
from p2pkv.core.machine import Machine
from p2pkv.core.messages import Message
from p2pkv.errors import ErrorCode, Failure
from p2pkv.net.descriptors import FRAME_S, open_unix_listener, receive_frame, send_frame
from p2pkv.net.driver import Driver, EventSink
from p2pkv.net.engine_door import CONNECTIONS_MAX, LEASES_MAX, EngineDoor
from p2pkv.store import memory
from p2pkv.store.cpu import CpuStore
from p2pkv.wire.engine import (
    Attach,
    Attached,
    Commit,
    EngineReply,
    EngineRequest,
    Lent,
    LookupReply,
    LookupRequest,
    ReadDone,
    Refused,
    Retrieved,
    RetrieveRequest,
    Stored,
    StoreRequest,
    reply_codec,
    request_codec,
)
from p2pkv.wire.frames import Frame, close_all, encode_frame, rights
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES

LEASE_S = 30.0
ATTACH = Attach(
    version=1, model="m", weights=None, dtype="float32", layers=2, planes=2, kv_heads=2, head_dim=4, world_size=1, worker=0
)
NOBODY = Identity()
Reply = TypeVar("Reply", bound=EngineReply)


class NoPeers:
    """Links and lanes of a node that is alone."""

    async def dial(self, address: Address, report: EventSink) -> None:
        raise AssertionError

    def send(self, link: LinkId, message: Message) -> None:
        raise AssertionError

    def close(self, link: LinkId, reason: str) -> None:
        raise AssertionError

    async def fetch(self, order: effects.FetchChunks, fetched: list[ChunkKey]) -> Failure | None:
        raise AssertionError


class Client:
    """An engine that sends what it is told to, right or wrong."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self.connection = connection

    async def send(self, request: EngineRequest) -> None:
        await send_frame(self.connection, request_codec().encode(request))

    async def receive(self) -> tuple[EngineReply, Frame]:
        with trio.fail_after(5 * FRAME_S):
            frame = await receive_frame(self.connection)
        assert frame is not None, "disconnected without a reason"
        return reply_codec().decode(frame.payload), frame

    async def ask(self, request: EngineRequest, kind: type[Reply]) -> tuple[Reply, Frame]:
        await self.send(request)
        reply, frame = await self.receive()
        assert isinstance(reply, kind), reply
        return reply, frame

    async def store(self, tokens: bytes, content: bytes = b"\x01") -> Stored:
        lent, frame = await self.ask(StoreRequest(NOBODY, tokens, 0), Lent)
        with frame:
            for shard, descriptor in zip(lent.shards, frame.descriptors, strict=True):
                os.pwrite(descriptor, content * memory.page_rounded(shard.nbytes), 0)
        return (await self.ask(Commit(lent.lease), Stored))[0]

    async def wait_disconnected(self) -> Failure:
        reply, _ = await self.receive()
        assert isinstance(reply, Refused)
        assert reply.failure.code is ErrorCode.PROTOCOL_ERROR
        with trio.fail_after(FRAME_S), suppress(ConnectionResetError):  # the node may not have read all that was sent
            assert await receive_frame(self.connection) is None
        return reply.failure

    async def aclose(self) -> None:
        self.connection.close()


class Node:
    """The core, the store and the door of a node, and a folder for its socket."""

    def __init__(self, path: Path, chunk_size: int, limit_nbytes: int) -> None:
        self.path = path
        self.store = CpuStore()
        config = MachineConfig(
            instance="a",
            generation=1,
            cluster="c",
            ws=Address("127.0.0.1", 1),
            http="",
            transfer=None,
            handoff=None,
            zone="",
            chunk_size=chunk_size,
            cpu_limit_nbytes=limit_nbytes,
            descriptor_limit=10_000,
            move_deadline_s=600,
            lease_s=LEASE_S,
            leave_s=2,
            peer_fetch=False,
            wall_offset_s=0,
        )
        self.machine = Machine(config, Random("a"), trio.current_time())
        peers = NoPeers()
        self.driver = Driver(self.machine, memories={Location.LOCAL_CPU: self.store}, links=peers, fetcher=peers)
        self.door = EngineDoor(self.driver, self.store, chunk_size=chunk_size, cache_epoch="7")

    async def connect(self, attach: Attach | None = ATTACH) -> Client:
        connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await connection.connect(str(self.path))
        client = Client(connection)
        if attach is not None:
            await client.ask(attach, Attached)
        return client


@asynccontextmanager
async def open_node(chunk_size: int = 4, limit_nbytes: int = 2**20) -> AsyncIterator[Node]:
    """A node that must have lost neither a descriptor nor its mind in the end."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with TemporaryDirectory(prefix="p2pkv-") as folder:
        node = Node(Path(folder) / "engine.sock", chunk_size, limit_nbytes)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.driver.run)
            await nursery.start(node.door.serve, open_unix_listener(node.path))
            yield node
            await wait_all_tasks_blocked()
            node.machine.check_invariants()
            assert node.store.statistics().staged_count == 0
            nursery.cancel_scope.cancel()
        node.store.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with open_node() as node:
        yield node


def packed(*tokens: int) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)


async def lookup(client: Client, tokens: bytes) -> int:
    return (await client.ask(LookupRequest(NOBODY, tokens), LookupReply))[0].num_tokens


# --- what it is for -------------------------------------------------------------------------------------------------------


async def test_the_node_adds_chunk_size_and_epoch_to_an_engines_namespace(node: Node) -> None:
    async with aclosing(await node.connect(attach=None)) as client:
        attached, _ = await client.ask(ATTACH, Attached)
    assert (attached.namespace.chunk_size, attached.namespace.weights) == (4, "7")
    async with aclosing(await node.connect(attach=None)) as client:
        attached, _ = await client.ask(replace(ATTACH, weights="digest"), Attached)
    assert attached.namespace.weights == "digest"


async def test_what_is_stored_is_retrieved_as_sealed_memory(node: Node) -> None:
    tokens = packed(1, 2, 3, 4, 5)
    async with aclosing(await node.connect()) as client:
        assert (await client.store(tokens, b"\x07")).held_tokens == 5
        assert await lookup(client, tokens + packed(6)) == 5
        retrieved, frame = await client.ask(RetrieveRequest(NOBODY, tokens, 0), Retrieved)
        assert [(shard.start, shard.used_count) for shard in retrieved.shards] == [(0, 4), (4, 1)]
        with frame:
            for shard, descriptor in zip(retrieved.shards, frame.descriptors, strict=True):
                memory.check_foreign(descriptor, shard.nbytes)
                assert os.pread(descriptor, shard.nbytes, 0) == b"\x07" * shard.nbytes
        await client.send(ReadDone(retrieved.lease))


async def test_a_miss_has_no_lease_and_no_shards(node: Node) -> None:
    async with aclosing(await node.connect()) as client:
        retrieved, _ = await client.ask(RetrieveRequest(NOBODY, packed(1), 0), Retrieved)
    assert retrieved == Retrieved(lease="", num_tokens=0, shards=())


async def test_an_engine_that_keeps_writing_while_it_commits_is_refused(node: Node) -> None:
    async with aclosing(await node.connect()) as client:
        lent, frame = await client.ask(StoreRequest(NOBODY, packed(1, 2, 3, 4), 0), Lent)
        with frame, mmap.mmap(frame.descriptors[0], 4096) as still_mapped:
            still_mapped[:] = b"\x01" * 4096
            stored, _ = await client.ask(Commit(lent.lease), Stored)
        assert stored.held_tokens == 0
        assert stored.failure is not None
        assert "still maps it" in stored.failure.detail
        assert node.store.statistics().descriptor_count == 0
        assert (await client.store(packed(1, 2, 3, 4))).held_tokens == 4


async def test_a_chunk_with_a_hole_ends_the_prefix_before_it(node: Node) -> None:
    async with aclosing(await node.connect()) as client:
        lent, frame = await client.ask(StoreRequest(NOBODY, packed(*range(8)), 0), Lent)
        with frame:
            os.pwrite(frame.descriptors[0], b"\x01" * 4096, 0)
        stored, _ = await client.ask(Commit(lent.lease), Stored)
        assert stored.held_tokens == 4
        assert stored.failure is not None


async def test_an_engine_that_dies_between_lend_and_commit_leaves_nothing(node: Node) -> None:
    async with aclosing(await node.connect()) as client:
        _, frame = await client.ask(StoreRequest(NOBODY, packed(1, 2, 3, 4), 0), Lent)
        close_all(frame.descriptors)
        assert node.store.statistics().staged_count == 1
    await wait_all_tasks_blocked()
    assert node.store.statistics().descriptor_count == 0


async def test_a_lease_that_was_not_committed_in_time_is_freed_and_refused(node: Node, mock_clock: MockClock) -> None:
    async with aclosing(await node.connect()) as client:
        lent, frame = await client.ask(StoreRequest(NOBODY, packed(1, 2, 3, 4), 0), Lent)
        close_all(frame.descriptors)
        mock_clock.jump(LEASE_S + 1)
        await wait_all_tasks_blocked()
        assert node.store.statistics().descriptor_count == 0
        refused, _ = await client.ask(Commit(lent.lease), Refused)
        assert refused.failure.code is ErrorCode.DEADLINE_EXCEEDED
        assert (await client.store(packed(1, 2, 3, 4))).held_tokens == 4


async def test_a_late_commit_does_not_seal_what_was_lent_to_another_since(node: Node, mock_clock: MockClock) -> None:
    tokens = packed(1, 2, 3, 4)
    async with aclosing(await node.connect()) as late, aclosing(await node.connect()) as other:
        late_lent, late_frame = await late.ask(StoreRequest(NOBODY, tokens, 0), Lent)
        close_all(late_frame.descriptors)
        mock_clock.jump(LEASE_S + 1)
        await wait_all_tasks_blocked()
        lent, frame = await other.ask(StoreRequest(NOBODY, tokens, 0), Lent)
        await late.ask(Commit(late_lent.lease), Refused)
        with frame:
            os.pwrite(frame.descriptors[0], b"\x01" * 4096, 0)
        stored, _ = await other.ask(Commit(lent.lease), Stored)
        assert stored == Stored(held_tokens=4, failure=None)


# --- who misbehaves is disconnected, and nobody else ----------------------------------------------------------------------


async def refused_for(node: Node, data: bytes, attach: Attach | None = ATTACH) -> str:
    """Why a client that sends `data` is disconnected, while another one goes on."""
    async with aclosing(await node.connect()) as bystander, aclosing(await node.connect(attach)) as client:
        await bystander.store(packed(1, 2))
        await client.connection.send(data)
        failure = await client.wait_disconnected()
        assert await lookup(bystander, packed(1, 2)) == 2
        return failure.detail


def frame_of(request: EngineRequest) -> bytes:
    return encode_frame(request_codec().encode(request))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode_frame(b"\xc1"), "not msgpack"),
        (encode_frame(b"\x80"), "no type"),
        (encode_frame(reply_codec().encode(LookupReply(1))), "no type"),
        (struct.pack("<I", 0), "frame of 0 bytes"),
        (struct.pack("<I", MAX_MESSAGE_NBYTES + 1), "frame of 8388609 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "frame of 542393671 bytes"),
        (frame_of(ATTACH), "attached already"),
        (frame_of(Commit("lease-0")), "doesn't have"),
        (frame_of(LookupRequest(NOBODY, b"\x01\x02\x03")), "whole int32"),
        (frame_of(StoreRequest(NOBODY, b"\x01\x02\x03", 0)), "whole int32"),
        (frame_of(RetrieveRequest(NOBODY, b"\x01\x02\x03", 0)), "whole int32"),
        (frame_of(StoreRequest(NOBODY, b"", -1)), "first_token"),
    ],
)
async def test_a_client_that_breaks_the_protocol_is_disconnected_alone(node: Node, data: bytes, reason: str) -> None:
    assert reason in await refused_for(node, data)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (LookupRequest(NOBODY, b""), "first request"),
        (replace(ATTACH, version=2), "version 2"),
        (replace(ATTACH, layers=0), "layers"),
        (replace(ATTACH, worker=-1), "worker"),
    ],
)
async def test_a_client_that_does_not_attach_rightly_is_disconnected(node: Node, request_: EngineRequest, reason: str) -> None:
    assert reason in await refused_for(node, frame_of(request_), attach=None)


@pytest.mark.parametrize("wrong", [{"dtype": "float3"}, {"kv_heads": 3, "world_size": 2}, {"worker": 1}])
async def test_an_engine_that_cannot_be_served_is_told_why(node: Node, wrong: dict[str, object]) -> None:
    async with aclosing(await node.connect(attach=None)) as client:
        refused, _ = await client.ask(replace(ATTACH, **wrong), Refused)  # type: ignore[arg-type]
    assert refused.failure.code in (ErrorCode.NAMESPACE_MISMATCH, ErrorCode.INVALID_REQUEST)


async def test_a_client_that_passes_descriptors_is_disconnected_and_they_are_closed(node: Node) -> None:
    file = os.memfd_create("file")
    async with aclosing(await node.connect()) as client:
        await send_frame(client.connection, request_codec().encode(LookupRequest(NOBODY, b"")), [file] * 3)
        assert "passes no descriptors" in (await client.wait_disconnected()).detail
    os.close(file)


async def test_descriptors_beyond_the_limit_are_refused_and_closed(node: Node) -> None:
    file = os.memfd_create("file")
    data = frame_of(LookupRequest(NOBODY, b""))
    async with aclosing(await node.connect()) as client:
        for position in range(0, 12, 4):
            await client.connection.sendmsg([data[position : position + 4]], rights([file] * 100))
        assert "at most 250" in (await client.wait_disconnected()).detail
    os.close(file)


async def test_a_frame_that_is_cut_off_by_the_end_is_no_request(node: Node) -> None:
    async with aclosing(await node.connect()) as client:
        await client.connection.send(frame_of(LookupRequest(NOBODY, packed(1)))[:-1])
        client.connection.shutdown(socket.SHUT_WR)
        assert "middle of a frame" in (await client.wait_disconnected()).detail


@pytest.mark.parametrize("nbytes", [1, 4, 20])
async def test_half_a_frame_has_a_deadline_and_an_idle_engine_has_none(node: Node, mock_clock: MockClock, nbytes: int) -> None:
    async with aclosing(await node.connect()) as idle, aclosing(await node.connect()) as client:
        await client.connection.send(frame_of(LookupRequest(NOBODY, packed(1)))[:nbytes])
        await wait_all_tasks_blocked()
        mock_clock.jump(FRAME_S + 1)
        assert "wasn't complete" in (await client.wait_disconnected()).detail
        mock_clock.jump(24 * 3600)
        assert await lookup(idle, packed(1)) == 0


async def test_a_client_that_never_reads_its_replies_is_disconnected(node: Node, mock_clock: MockClock) -> None:
    async def flood() -> None:
        while True:
            await client.connection.send(frame_of(LookupRequest(NOBODY, b"")))

    async def flood_until_disconnected() -> None:
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            await flood()

    async with aclosing(await node.connect()) as client, trio.open_nursery() as nursery:
        nursery.start_soon(flood_until_disconnected)
        await wait_all_tasks_blocked()
        mock_clock.jump(FRAME_S + 1)


async def test_one_engine_can_leave_only_so_many_leases_uncommitted(node: Node) -> None:
    async with aclosing(await node.connect()) as client:
        for token in range(LEASES_MAX):
            _, frame = await client.ask(StoreRequest(NOBODY, packed(token), 0), Lent)
            close_all(frame.descriptors)
        await client.send(StoreRequest(NOBODY, packed(LEASES_MAX), 0))
        assert "aren't committed" in (await client.wait_disconnected()).detail


async def test_one_connection_too_many_is_turned_away(node: Node) -> None:
    clients = [await node.connect() for _ in range(CONNECTIONS_MAX)]
    surplus = await node.connect(attach=None)
    assert "open already" in (await surplus.wait_disconnected()).detail
    for client in (*clients[1:], surplus):
        await client.aclose()
    assert await lookup(clients[0], b"") == 0
    await clients[0].aclose()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
async def test_a_process_of_another_user_is_disconnected(node: Node) -> None:
    node.path.parent.chmod(0o755)
    node.path.chmod(0o777)
    child = os.fork()
    if child == 0:
        os.seteuid(65534)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(node.path))
        os._exit(0 if b"another user" in connection.recv(1000) else 1)
    with trio.fail_after(FRAME_S):
        _, status = await trio.to_thread.run_sync(os.waitpid, child, 0)
    assert status == 0


@given(st.binary(min_size=1, max_size=100), st.booleans(), st.booleans())
async def test_whatever_bytes_come_whole_or_one_by_one_the_node_goes_on(garbage: bytes, framed: bool, one_by_one: bool) -> None:
    data = encode_frame(garbage) if framed else garbage
    step = 1 if one_by_one else len(data)
    async with open_node() as node, aclosing(await node.connect()) as client:
        with suppress(BrokenPipeError):  # the first bytes may be reason enough
            for position in range(0, len(data), step):
                await client.connection.send(data[position : position + step])
            client.connection.shutdown(socket.SHUT_WR)
        await client.wait_disconnected()
        async with aclosing(await node.connect()) as other:
            assert (await other.store(packed(1))).held_tokens == 1

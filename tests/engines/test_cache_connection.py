"""The engine's end against nodes that misbehave: each is a thread with a real socket and a script of replies."""

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from p2pkv.core.effects import RetrievedShard
from p2pkv.core.keys import Namespace
from p2pkv.engines import EngineCache, KVLayout
from p2pkv.engines.cache import Tokens
from p2pkv.engines.connection import EngineConnection
from p2pkv.errors import ErrorCode, Failure, InvalidRequestError, NodeUnreachableError, RemoteProtocolError, StoreFullError
from p2pkv.store import memory
from p2pkv.wire.engine import Attach, Attached, EngineReply, LookupReply, Refused, Retrieved, reply_codec
from p2pkv.wire.frames import encode_frame, rights

LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=4, dtype="float32")
ATTACH = Attach(
    version=1, model="m", weights=None, dtype="float32", layers=1, planes=2, kv_heads=1, head_dim=4, world_size=1, worker=0
)
ATTACHED = Attached(
    Namespace(model="m", weights="0", dtype="float32", layers=1, planes=2, kv_heads=1, head_dim=4, chunk_size=4, world_size=1)
)

Script = Callable[[socket.socket], None]
"""What the node does with one connection, before it closes it."""


def reply(*replies: EngineReply | bytes, descriptors: list[int] | None = None) -> Script:
    """Answer each request with the next reply, the last one with descriptors."""

    def script(connection: socket.socket) -> None:
        for each in replies:
            assert connection.recv(2**16)
            payload = each if isinstance(each, bytes) else reply_codec().encode(each)
            passed = rights(descriptors or []) if each is replies[-1] else []
            connection.sendmsg([encode_frame(payload)], passed)

    return script


@contextmanager
def node(path: Path, *scripts: Script) -> Iterator[EngineCache]:
    """A cache attached to a node that has a script for each connection; no descriptor may be left in the end."""
    before = set(Path("/proc/self/fd").iterdir())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path / "s"))
    listener.listen()
    listener.settimeout(5)

    def run() -> None:
        for script in scripts:
            connection, _ = listener.accept()
            connection.settimeout(5)
            with connection:
                script(connection)

    thread = Thread(target=run)
    thread.start()
    with listener, EngineCache(partial(EngineConnection.open, path / "s"), ATTACH, LAYOUT) as cache:
        yield cache
        thread.join(5)
    assert not thread.is_alive()
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_no_node_is_said_so(tmp_path: Path) -> None:
    cache = EngineCache(partial(EngineConnection.open, tmp_path / "s"), ATTACH, LAYOUT)
    with pytest.raises(NodeUnreachableError, match="no node listens"):
        cache.lookup([1])


def test_a_node_that_dies_costs_one_call_and_the_next_one_connects_anew(tmp_path: Path) -> None:
    with node(tmp_path, reply(ATTACHED, LookupReply(2)), reply(ATTACHED, LookupReply(1))) as cache:
        assert cache.lookup([1, 2]) == 2
        with pytest.raises(NodeUnreachableError):
            cache.lookup([1, 2])
        assert cache.lookup([1, 2]) == 1


def test_a_refused_attach_is_the_callers_error(tmp_path: Path) -> None:
    with (
        node(tmp_path, reply(Refused(Failure(ErrorCode.NAMESPACE_MISMATCH, "dtype 'x' is unknown")))) as cache,
        pytest.raises(Exception, match="dtype 'x' is unknown"),
    ):
        cache.lookup([1])


def test_a_refusal_keeps_the_connection(tmp_path: Path) -> None:
    refused = Refused(Failure(ErrorCode.STORE_FULL, "full"))
    with node(tmp_path, reply(ATTACHED, refused, LookupReply(1))) as cache:
        with pytest.raises(StoreFullError):
            cache.store([1], torch.zeros(LAYOUT.shape(1)))
        assert cache.lookup([1]) == 1


def test_after_a_protocol_error_the_next_call_connects_anew(tmp_path: Path) -> None:
    refused = Refused(Failure(ErrorCode.PROTOCOL_ERROR, "Disconnected: garbage."))
    with node(tmp_path, reply(ATTACHED, refused), reply(ATTACHED, LookupReply(1))) as cache:
        with pytest.raises(InvalidRequestError):
            cache.lookup([1])
        assert cache.lookup([1]) == 1


@pytest.mark.parametrize(
    "nonsense", [b"\xc1", b"\x80", reply_codec().encode(ATTACHED)], ids=["garbage", "no type", "wrong type"]
)
def test_a_reply_that_makes_no_sense_ends_the_connection(tmp_path: Path, nonsense: bytes) -> None:
    with node(tmp_path, reply(ATTACHED, nonsense), reply(ATTACHED, LookupReply(1))) as cache:
        with pytest.raises(RemoteProtocolError):
            cache.lookup([1])
        assert cache.lookup([1]) == 1


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_reply_with_too_few_or_too_many_descriptors_is_refused(tmp_path: Path, count: int) -> None:
    shards = tuple(RetrievedShard(b"k" * 16, start, 1, 1, 32) for start in (0, 1))
    file = os.memfd_create("file")
    with (
        node(tmp_path, reply(ATTACHED, Retrieved("lease", 2, shards), descriptors=[file] * count)) as cache,
        pytest.raises(RemoteProtocolError, match=f"with {count} descriptors"),
    ):
        cache.retrieve([1, 2])
    os.close(file)


def test_shards_that_leave_a_gap_are_never_taken_for_a_prefix(tmp_path: Path) -> None:
    shard = RetrievedShard(b"k" * 16, 1, 1, 1, 32)
    file = memory.create(32)
    with (
        node(tmp_path, reply(ATTACHED, Retrieved("lease", 2, (shard,)), descriptors=[file])) as cache,
        pytest.raises(RemoteProtocolError, match="0 was next"),
    ):
        cache.retrieve([1, 2])
    os.close(file)


def test_a_reply_cut_off_in_its_middle_is_a_lost_connection(tmp_path: Path) -> None:
    def half(connection: socket.socket) -> None:
        reply(ATTACHED)(connection)
        connection.recv(2**16)
        connection.sendall(encode_frame(reply_codec().encode(LookupReply(1)))[:-3])

    with node(tmp_path, half) as cache, pytest.raises(NodeUnreachableError, match="lost"):
        cache.lookup([1])


def test_a_silent_node_is_given_up_after_the_time_that_the_engine_gives_it(tmp_path: Path) -> None:
    is_over = Event()

    def say_nothing(connection: socket.socket) -> None:
        is_over.wait(5)

    with node(tmp_path, say_nothing):
        connection = EngineConnection.open(tmp_path / "s", reply_s=0.1)
        with pytest.raises(NodeUnreachableError, match="timed out"):
            connection.ask(ATTACH, Attached)
        assert connection.is_closed
        is_over.set()


def test_closing_wakes_a_call_that_waits_for_a_silent_node(tmp_path: Path) -> None:
    is_asked, is_over = Event(), Event()

    def say_nothing(connection: socket.socket) -> None:
        reply(ATTACHED)(connection)
        assert connection.recv(2**16)
        is_asked.set()
        is_over.wait(5)

    with node(tmp_path, say_nothing) as cache, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.lookup, [1])
        assert is_asked.wait(5)
        cache.close()
        with pytest.raises(NodeUnreachableError):
            waiting.result(5)
        is_over.set()


def test_a_closed_cache_says_so(tmp_path: Path) -> None:
    with node(tmp_path, reply(ATTACHED, LookupReply(1))) as cache:
        assert cache.lookup([1]) == 1
        cache.close()
        with pytest.raises(NodeUnreachableError, match="closed"):
            cache.lookup([1])


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**31],
        [1.5],
        ["1"],
        [None],
        [[1]],
        7,
        range(1_048_577),
        torch.tensor([1.5]),
        torch.tensor([[1]]),
        torch.tensor(1),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused_before_the_node_hears_of_it(tmp_path: Path, tokens: Tokens) -> None:
    cache = EngineCache(partial(EngineConnection.open, tmp_path / "nobody"), ATTACH, LAYOUT)
    with pytest.raises(InvalidRequestError, match="tokens"):
        cache.lookup(tokens)

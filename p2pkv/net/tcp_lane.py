"""A TCP lane once it is open: whole shards through a blocking socket, in threads.

Blocking calls in a thread carry twice as many bytes as the event loop can. The source sends from a map of the sealed memfd:
nothing changes on its way. `sendfile` would save it that copy, but makes packets of single pages, which cost the target more.
The target receives into memory that was faulted in ahead, where the store has such; else through one small buffer that stays in
the processor's cache, and by `pwrite`: faults in a map of fresh memory would cost more than that copy. Every call gives up the
GIL.

A cancelled lane is shut down, which wakes its thread within milliseconds; the thread is always waited for, as it writes memory.
"""

import os
import select
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from mmap import MAP_PRIVATE, PROT_READ, mmap
from typing import TypeVar, TypeVarTuple

import trio
from xxhash import xxh3_128

from p2pkv.errors import RemoteProtocolError
from p2pkv.net.lanes import STALL_S
from p2pkv.wire.lane import CHECKSUM_NBYTES, SHARD_HEADER_NBYTES, ShardHeader

LANES_AT_ONCE = 16
"""Lanes that carry bytes at the same time, at each end, a thread each; more would share the same processors and network."""
SLICE_NBYTES = 256 * 1024
"""Received, or sent under a rate limit, in one call. It fits in a second-level cache; with 16 lanes and the least
`transfer_rate_limit`, 1 MiB/s, one takes 4 s, well within `STALL_S`."""
FREE_SLICE_NBYTES = 2**20
"""Sent in one call where nothing limits the rate: a seventh faster than `SLICE_NBYTES`."""
CATCH_UP_S = 0.05
"""So far a rate limit makes good what a late thread lost: waits are in whole milliseconds, and threads start late."""

_TIMEVAL = struct.Struct("ll")
"""`struct timeval`: seconds, microseconds."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class RateLimit:
    """Shares a rate between all threads that send: each asks how long to wait before its next slice."""

    def __init__(self, nbytes_per_s: float) -> None:
        self._nbytes_per_s = nbytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def reserve(self, nbytes: int) -> float:
        """Take `nbytes` of the rate; they may be sent after so many seconds."""
        with self._lock:
            now = time.monotonic()
            starts_at = max(self._free_at, now - CATCH_UP_S)
            self._free_at = starts_at + nbytes / self._nbytes_per_s
            return max(0.0, starts_at - now)


class TcpLane:
    """An open lane; `open_tcp_lane` makes it. `send_shard` and `receive_shard` block: give them to `run`, one at a time."""

    def __init__(self, connection: socket.socket, threads: trio.CapacityLimiter, limit: RateLimit | None) -> None:
        self._connection = connection
        self._threads = threads
        self._limit = limit
        self._buffer = memoryview(bytearray(SLICE_NBYTES))
        self._end = select.poll()
        self._end.register(connection, select.POLLRDHUP)

    async def run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call `work` in a thread. Cancelled, it waits for the thread, which ends at once in an error."""
        return await trio.to_thread.run_sync(work, *args, limiter=self._threads)

    def send_shard(self, header: ShardHeader, descriptor: int, checksum: bytes | None) -> bytes:
        """Send a shard's payload from its memory, between its header and its checksum.

        Args:
            header: Says how many bytes.
            descriptor: Of sealed memory; the caller keeps it open until this returns.
            checksum: As known from an earlier trip, or None to compute it on the way.

        Returns:
            The checksum.

        Raises:
            OSError: The connection broke, or the target didn't take what was sent.
        """
        self.send(header.encode())
        slice_nbytes = SLICE_NBYTES if self._limit else FREE_SLICE_NBYTES
        digest = xxh3_128()
        # Private, as older kernels share no map of sealed memory that was opened for writing.
        with mmap(descriptor, header.nbytes, flags=MAP_PRIVATE, prot=PROT_READ) as mapped, memoryview(mapped) as payload:
            for offset in range(0, header.nbytes, slice_nbytes):
                with payload[offset : offset + slice_nbytes] as piece:
                    if checksum is None:
                        digest.update(piece)
                    self._send(piece)
        checksum = checksum or digest.digest()
        self.send(checksum)
        return checksum

    def receive_shard(self, expected: ShardHeader, descriptor: int, warm: mmap | None) -> bytes | None:
        """Receive a shard's payload into its memory.

        Args:
            expected: What its header must say.
            descriptor: Of memory for that many bytes; nobody else uses it until this returns.
            warm: A map of all of it, if its pages are there already; the caller's.

        Returns:
            The checksum, which is right; None when the source doesn't hold the chunk, and nothing was written.

        Raises:
            RemoteProtocolError: Another shard came, or other bytes than were sent, or the lane ended.
            OSError: The connection broke, or nothing came.
        """
        header = ShardHeader.decode(self._receive_bytes(SHARD_HEADER_NBYTES))
        if header == ShardHeader(expected.key, worker=0, nbytes=0):
            return None
        if header != expected:
            raise RemoteProtocolError("it sent a shard that wasn't asked for")
        computed = self._receive_fresh(header.nbytes, descriptor) if warm is None else self._receive_warm(header.nbytes, warm)
        checksum = self._receive_bytes(CHECKSUM_NBYTES)
        if computed != checksum:
            raise RemoteProtocolError("a shard arrived with another checksum than it was sent with")
        return checksum

    def send(self, data: bytes) -> None:
        """Send at most `SLICE_NBYTES`, within `STALL_S` after the rate limit lets them pass."""
        with memoryview(data) as piece:
            self._send(piece)

    def _send(self, piece: memoryview) -> None:
        wait_s = 0.0 if self._limit is None else self._limit.reserve(len(piece))
        if wait_s:
            self._end.poll(wait_s * 1000)  # a lane that ends meanwhile is noticed by the send
        sent_nbytes = 0
        gives_up_at = time.monotonic() + STALL_S
        while sent_nbytes < len(piece):
            try:
                with piece[sent_nbytes:] as rest:
                    sent_nbytes += self._connection.send(rest)
            except BlockingIOError:
                break
            if time.monotonic() >= gives_up_at:
                break
        if sent_nbytes < len(piece):
            raise TimeoutError(f"it took too little of what was sent for {STALL_S:g} s")

    def _receive_fresh(self, nbytes: int, descriptor: int) -> bytes:
        """Receive a payload by way of the buffer; its checksum."""
        digest = xxh3_128()
        for offset in range(0, nbytes, SLICE_NBYTES):
            piece = self._buffer[: nbytes - offset]
            self._receive(piece)
            digest.update(piece)
            _write(descriptor, piece, offset)
        return digest.digest()

    def _receive_warm(self, nbytes: int, warm: mmap) -> bytes:
        """Receive a payload into its place; its checksum. No view of `warm` is left, or it couldn't be closed."""
        digest = xxh3_128()
        with memoryview(warm) as memory, memory[:nbytes] as payload:
            for offset in range(0, nbytes, SLICE_NBYTES):
                with payload[offset : offset + SLICE_NBYTES] as piece:
                    self._receive(piece)
                    digest.update(piece)
        return digest.digest()

    def _receive_bytes(self, nbytes: int) -> bytes:
        piece = self._buffer[:nbytes]
        self._receive(piece)
        return bytes(piece)

    def _receive(self, piece: memoryview) -> None:
        """Fill `piece`, at most `SLICE_NBYTES`, within `STALL_S`."""
        received_nbytes = 0
        gives_up_at = time.monotonic() + STALL_S
        while received_nbytes < len(piece):
            try:
                with piece[received_nbytes:] as rest:
                    count = self._connection.recv_into(rest, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                break
            if not count:
                raise RemoteProtocolError("it closed the lane in the middle")
            received_nbytes += count
            if time.monotonic() >= gives_up_at:
                break
        if received_nbytes < len(piece):
            raise TimeoutError(f"too little came for {STALL_S:g} s")


@asynccontextmanager
async def open_tcp_lane(
    connection: trio.socket.SocketType, threads: trio.CapacityLimiter, limit: RateLimit | None = None
) -> AsyncIterator[TcpLane]:
    """Take a connected socket away from the event loop; on exit, and at once when cancelled, it is shut down.

    Args:
        connection: Of no use afterwards.
        threads: Whose threads the lane's work runs in.
        limit: How fast it may send.
    """
    with socket.socket(fileno=connection.detach()) as blocking:
        blocking.setblocking(True)  # never a timeout of Python's, with which MSG_WAITALL returns early
        seconds, microseconds = divmod(int(STALL_S * 1_000_000), 1_000_000)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            blocking.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, microseconds))
        _choose_congestion_control(blocking)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_shut_down_at_end, blocking)
            yield TcpLane(blocking, threads, limit)
            nursery.cancel_scope.cancel()


async def _shut_down_at_end(connection: socket.socket) -> None:
    try:
        await trio.sleep_forever()
    finally:
        with suppress(OSError):  # the other end was faster
            connection.shutdown(socket.SHUT_RDWR)


def _choose_congestion_control(connection: socket.socket) -> None:
    """Where both ends are one host, nothing is congested: there BBR, some systems' choice, has a third of cubic's rate."""
    if connection.getsockname()[0] == connection.getpeername()[0]:
        with suppress(OSError):  # a kernel without it keeps its own choice
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


def _write(descriptor: int, piece: memoryview, offset: int) -> None:
    while piece:
        count = os.pwrite(descriptor, piece, offset)
        piece, offset = piece[count:], offset + count

"""Frames with descriptors over unix sockets, the trio side: what the engine socket and the handoff lane are made of.

The TCP lane opens with the same frames, without descriptors.
"""

import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import trio

from p2pkv.errors import RemoteProtocolError
from p2pkv.wire.frames import ANCILLARY_NBYTES, Frame, FrameAssembler, close_all, encode_frame, rights
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES

FRAME_S = 10.0
"""A frame that has begun must have passed by then. Both ends are on one host: the largest, 8 MiB, takes milliseconds, and a
process that stood still for so long has lost its turn."""

_BACKLOG = 64
_PEER_CREDENTIALS = struct.Struct("3i")
"""`struct ucred`: process, user, group."""


def open_unix_listener(path: Path) -> trio.socket.SocketType:
    """Listen at `path`, where nothing is yet, for this user alone."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before it has a name; the umask can only take more away
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return trio.socket.from_stdlib_socket(listener)


def is_own_user(connection: trio.socket.SocketType) -> bool:
    """Whether the process at the other end of a unix socket runs as this process's user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, user, _ = _PEER_CREDENTIALS.unpack(credentials)
    return bool(user == os.geteuid())


async def receive_frame(connection: trio.socket.SocketType, limit_nbytes: int = MAX_MESSAGE_NBYTES) -> Frame | None:
    """Wait for the next frame, for ever until it begins, then at most `FRAME_S`.

    Args:
        connection: A unix socket, or one that passes no descriptors.
        limit_nbytes: Of the payload.

    Returns:
        The frame, whose descriptors the caller owns; None when the other end has closed the connection.

    Raises:
        RemoteProtocolError: It is cut off, too slow, or beyond a limit. All that came with it is closed.
        OSError: The connection broke.

    A cancelled wait may have read part of a frame: close the connection then.
    """
    with FrameAssembler(limit_nbytes) as assembler, trio.CancelScope() as rest:
        while assembler.missing_nbytes:
            data, ancillary, flags, _ = await connection.recvmsg(
                assembler.missing_nbytes, ANCILLARY_NBYTES, socket.MSG_CMSG_CLOEXEC
            )
            if not data and not assembler.is_begun:
                return None
            if not data:
                raise RemoteProtocolError("the connection ended in the middle of a frame")
            if not assembler.is_begun:
                rest.deadline = trio.current_time() + FRAME_S
            assembler.feed(data, ancillary, flags)
        return assembler.take()
    raise RemoteProtocolError(f"a frame that had begun wasn't complete after {FRAME_S:g} s")


async def send_frame(connection: trio.socket.SocketType, payload: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send a frame and pass `descriptors`, which stay the caller's and may be closed meanwhile.

    Raises:
        OSError: The connection broke, or the other end didn't take the frame within `FRAME_S`.

    After an error or a cancellation part of the frame may be out: close the connection then.
    """
    data = memoryview(encode_frame(payload))
    passed: list[int] = []
    try:
        passed.extend(map(os.dup, descriptors))  # numbers that nobody closes, and others reuse, while this waits
        with trio.move_on_after(FRAME_S):
            sent = await connection.sendmsg([data], rights(passed))
            while sent < len(data):
                sent += await connection.send(data[sent:])
            return
    finally:
        close_all(passed)
    raise TimeoutError(f"the other end didn't take a frame within {FRAME_S:g} s")

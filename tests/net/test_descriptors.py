"""Frames as they come in from a socket: whatever bytes come, whole or one by one, they are a frame, its end, or an error."""

import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import RemoteProtocolError
from p2pkv.net.descriptors import receive_frame
from p2pkv.wire.frames import MAX_FRAME_DESCRIPTORS, close_all, encode_frame, rights

LIMIT_NBYTES = 64


@given(
    data=st.binary(max_size=100) | st.binary(max_size=2 * LIMIT_NBYTES).map(encode_frame),
    step=st.sampled_from([1, 3, 1000]),
    descriptor_count=st.sampled_from([0, 1, 253]),
)
async def test_any_bytes_are_a_frame_or_the_end_or_an_error(data: bytes, step: int, descriptor_count: int) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    near, far = trio.socket.socketpair()
    with near, far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_in_steps, near, data, step, descriptor_count)
            outcome = await outcome_of(far)
    claimed_nbytes: int = struct.unpack("<I", data[:4])[0] if len(data) >= 4 else -1
    match outcome:
        case None:
            assert not data
        case bytes():
            assert outcome == data[4 : 4 + len(outcome)]
            assert len(outcome) == claimed_nbytes
        case RemoteProtocolError():
            is_cut = len(data) < 4 + max(0, claimed_nbytes)
            assert is_cut or not 0 < claimed_nbytes <= LIMIT_NBYTES or descriptor_count > MAX_FRAME_DESCRIPTORS
    assert set(Path("/proc/self/fd").iterdir()) == before


async def outcome_of(connection: trio.socket.SocketType) -> bytes | RemoteProtocolError | None:
    """A frame's payload, or why there is none."""
    try:
        frame = await receive_frame(connection, LIMIT_NBYTES)
    except RemoteProtocolError as error:
        return error
    finally:
        connection.close()
    if frame is None:
        return None
    with frame:
        return frame.payload


async def send_in_steps(connection: trio.socket.SocketType, data: bytes, step: int, descriptor_count: int) -> None:
    """Send `data` in pieces, the first of which has descriptors with it, and nothing more."""
    descriptors = [os.memfd_create("test")] * descriptor_count if descriptor_count else []
    with suppress(OSError):  # the first bytes may be reason enough to close
        for start in range(0, len(data), step):
            await connection.sendmsg([data[start : start + step]], rights(descriptors if start == 0 else []))
        connection.shutdown(socket.SHUT_WR)
    close_all(descriptors[:1])

"""Frames on a unix socket: a length, a message, and the descriptors that ride along.

    frame = length of the payload, 4 bytes little-endian ‖ payload, msgpack

A frame goes out in one `sendmsg`, so that its descriptors arrive with its first byte, and comes in through a `FrameAssembler`,
which asks for exactly the bytes that are missing: descriptors never get into a neighbouring frame. How many there must be, the
message itself says. No socket is touched here; `net/descriptors` and `engines/connection` do that.
"""

import array
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from p2pkv.errors import RemoteProtocolError
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES

MAX_FRAME_DESCRIPTORS = 250
"""Linux passes at most 253 in one message."""

ANCILLARY_NBYTES = socket.CMSG_SPACE((MAX_FRAME_DESCRIPTORS + 3) * 4)
"""Room for all that Linux can pass: with less, it would install some of them and say so in `MSG_CTRUNC`."""

RECEIVE_NBYTES = 256 * 1024
"""At most so much is asked for at once, so that a claimed length alone costs no memory."""

_HEADER = struct.Struct("<I")

Ancillary = Sequence[tuple[int, int, bytes]]
"""Control messages as `recvmsg` gives them: level, type, data."""


def encode_frame(payload: bytes) -> bytes:
    """The bytes of a frame that carries `payload`."""
    return _HEADER.pack(len(payload)) + payload


def rights(descriptors: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """The control message for `sendmsg` that passes `descriptors`, at most `MAX_FRAME_DESCRIPTORS`."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] if descriptors else []


def close_all(descriptors: Iterable[int]) -> None:
    """Close each of `descriptors`."""
    for descriptor in descriptors:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as it came in. Leaving it as a context closes the descriptors that nobody took out of `descriptors`."""

    payload: bytes
    descriptors: list[int] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        close_all(self.descriptors)
        self.descriptors.clear()


class FrameAssembler:
    """Puts one frame together from what `recvmsg` gives. As a context, it closes descriptors of a frame that isn't completed.

    Receive at most `missing_nbytes` with room for `ANCILLARY_NBYTES`, `feed` it, and repeat until `missing_nbytes` is 0.

    Args:
        limit_nbytes: Of the payload.
    """

    def __init__(self, limit_nbytes: int = MAX_MESSAGE_NBYTES) -> None:
        self._limit_nbytes = limit_nbytes
        self._header = bytearray()
        self._payload = bytearray()
        self._payload_nbytes: int | None = None
        self._descriptors: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        close_all(self._descriptors)
        self._descriptors.clear()

    @property
    def missing_nbytes(self) -> int:
        """How much to ask for next; 0 when the frame is complete."""
        if self._payload_nbytes is None:
            return _HEADER.size - len(self._header)
        return min(self._payload_nbytes - len(self._payload), RECEIVE_NBYTES)

    @property
    def is_begun(self) -> bool:
        """Whether any byte has come."""
        return bool(self._header)

    def feed(self, data: bytes, ancillary: Ancillary, flags: int) -> None:
        """Add what one `recvmsg` gave: at least one byte, and not more than was missing.

        Raises:
            RemoteProtocolError: The frame is too large, carries too many descriptors, or some of them were cut off. Those
                that came are closed on exit.
        """
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received = array.array("i")
                received.frombytes(content[: len(content) // received.itemsize * received.itemsize])
                self._descriptors += received
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > MAX_FRAME_DESCRIPTORS:
            raise RemoteProtocolError(f"more descriptors than could be taken; a frame carries at most {MAX_FRAME_DESCRIPTORS}")
        if self._payload_nbytes is not None:
            self._payload += data
            return
        self._header += data
        if len(self._header) == _HEADER.size:
            (self._payload_nbytes,) = _HEADER.unpack(self._header)
            if not 0 < self._payload_nbytes <= self._limit_nbytes:
                raise RemoteProtocolError(f"a frame of {self._payload_nbytes} bytes; it must have 1 to {self._limit_nbytes}")

    def take(self) -> Frame:
        """The complete frame; its descriptors are the caller's."""
        frame = Frame(bytes(self._payload), self._descriptors)
        self._descriptors = []
        return frame

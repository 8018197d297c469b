"""The engine's end of the node's unix socket: blocking, for any thread, one exchange at a time."""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Self, TypeVar

from p2pkv.errors import ErrorCode, NodeUnreachableError, RemoteProtocolError, failure_error
from p2pkv.wire.engine import EngineReply, EngineRequest, Lent, Refused, Retrieved, reply_codec, request_codec
from p2pkv.wire.frames import ANCILLARY_NBYTES, Frame, FrameAssembler, encode_frame

REPLY_S = 30.0
"""The node answers within milliseconds; one that says nothing for so long is stopped or stuck, and an engine that waits for it
had better compute."""

Reply = TypeVar("Reply", bound=EngineReply)


class EngineConnection:
    """A connection to a node. Any failure but a refused request closes it for good."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._lock = Lock()

    @classmethod
    def open(cls, path: Path, reply_s: float = REPLY_S) -> Self:
        """Connect to the node whose engine socket is at `path`, and wait at most `reply_s` seconds for each of its replies.

        Raises:
            NodeUnreachableError: None listens there.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # By the kernel's timeouts: Python's own cost a second call for each, and with each call this thread gives up the
        # interpreter's lock, which the engine's thread then keeps for a while.
        timeval = struct.pack("@ll", *divmod(max(round(reply_s * 1e6), 1), 10**6))  # 0 would be without end
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, timeval)
        try:
            connection.connect(os.fspath(path))
        except OSError as error:
            connection.close()
            raise NodeUnreachableError(f"no node listens at {path}: {error.strerror or error}") from error
        return cls(connection)

    @property
    def is_closed(self) -> bool:
        """Whether it is of no more use."""
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Close this process's end. What is leased to it ends with it, unless a forked process shares it."""
        self._socket.close()

    def shut_down(self) -> None:
        """End the connection for every process that shares it, and wake the threads that wait on it."""
        with suppress(OSError):  # it may have ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self.close()

    @contextmanager
    def exchange(self, request: EngineRequest, kind: type[Reply]) -> Iterator[tuple[Reply, list[int]]]:
        """Send a request and wait for its reply.

        Args:
            request: One that has a reply.
            kind: The reply that it should have.

        Yields:
            The reply and its descriptors, one for each of its shards; they are closed at the exit.

        Raises:
            FailureError: The node refused the request; which kind says why.
            NodeUnreachableError: The connection is lost, or no reply came in time.
            RemoteProtocolError: The reply makes no sense. The connection is closed.
        """
        reply, frame = self._exchange(request, kind)
        with frame:
            if isinstance(reply, Refused):
                raise failure_error(reply.failure)
            yield reply, frame.descriptors

    def ask(self, request: EngineRequest, kind: type[Reply]) -> Reply:
        """`exchange` for a reply without descriptors."""
        with self.exchange(request, kind) as (reply, _):
            return reply

    def tell(self, request: EngineRequest) -> None:
        """Send a request that has no reply.

        Raises:
            NodeUnreachableError: The connection is lost.
        """
        with self._lock, self._closed_on_error():
            self._socket.sendall(encode_frame(request_codec().encode(request)))

    def _exchange(self, request: EngineRequest, kind: type[Reply]) -> tuple[Reply | Refused, Frame]:
        with self._lock, self._closed_on_error(), ExitStack() as stack:
            self._socket.sendall(encode_frame(request_codec().encode(request)))
            frame = stack.enter_context(self._receive_frame())
            reply = reply_codec().decode(frame.payload)
            shard_count = len(reply.shards) if isinstance(reply, Lent | Retrieved) else 0
            if not isinstance(reply, (kind, Refused)) or len(frame.descriptors) != shard_count:
                got = f"{type(reply).__name__} with {len(frame.descriptors)} descriptors"
                raise RemoteProtocolError(f"{got} came in reply to {type(request).__name__}")
            if isinstance(reply, Refused) and reply.failure.code is ErrorCode.PROTOCOL_ERROR:
                self.close()  # as the node does
            stack.pop_all()
            return reply, frame

    def _receive_frame(self) -> Frame:
        with FrameAssembler() as assembler:
            while assembler.missing_nbytes:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    assembler.missing_nbytes, ANCILLARY_NBYTES, socket.MSG_CMSG_CLOEXEC
                )
                if not data:
                    raise ConnectionResetError("the node closed it")
                assembler.feed(data, ancillary, flags)
            return assembler.take()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """An exchange that was cut short leaves a reply behind that nobody may take for another's."""
        try:
            yield
        except BlockingIOError as error:
            self.close()
            raise NodeUnreachableError("the connection to the node is lost: timed out") from error
        except OSError as error:
            self.close()
            raise NodeUnreachableError(f"the connection to the node is lost: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

"""A network of byte streams in memory, under trio's clock: what real links run over in the simulator's second level.

A stream behaves as TCP does as far as its ends can tell: bytes arrive in order, some time later; who sends more than is taken
waits; an end's close arrives behind its last byte. While nothing passes between two instances, nothing of theirs gets lost:
it arrives when they are whole again, if the stream still lives, and whoever connects waits.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from random import Random

import trio

from p2pkv.core.ids import Address, InstanceId

WINDOW_NBYTES = 256 * 1024
"""On their way in one direction; whoever sends more waits. About what Linux buffers for a TCP connection."""

Delay = Callable[[InstanceId, InstanceId], tuple[float, float]]
"""Shortest and longest time on the way from one instance to another."""


class StreamNetwork:
    """Listeners by address, streams between them, and what is cut.

    Args:
        rng: Draws the times on the way.
        names: Who is at each address.
        delay: How long bytes take.
    """

    def __init__(self, rng: Random, names: dict[Address, InstanceId], delay: Delay) -> None:
        self._rng = rng
        self._names = names
        self._delay = delay
        self._listeners: dict[InstanceId, MemoryListener] = {}
        self._streams: dict[MemoryStream, None] = {}
        self._cut_until: dict[tuple[InstanceId, InstanceId], float] = {}

    # --- for nodes --------------------------------------------------------------------------------------------------------

    def listen(self, name: InstanceId) -> "MemoryListener":
        """Take connections to an instance from now on."""
        assert name not in self._listeners, f"{name} listens already"
        listener = self._listeners[name] = MemoryListener(lambda: self._listeners.pop(name, None))
        return listener

    async def connect(self, name: InstanceId, places: Sequence[Address]) -> tuple[Address, trio.abc.Stream]:
        """Connect an instance to the first of `places`; as `Connect`.

        Raises:
            ConnectionRefusedError: Nobody listens there.
        """
        other = self._names[places[0]]
        await trio.sleep(self.draw_delay(name, other) + self.draw_delay(other, name))
        await trio.sleep_until(max(trio.current_time(), self.cut_until(name, other), self.cut_until(other, name)))
        if other not in self._listeners:
            raise ConnectionRefusedError(f"nobody listens at {places[0]}")
        there, back = _Pipe(self, name, other), _Pipe(self, other, name)
        near, far = MemoryStream(back, there, self._streams), MemoryStream(there, back, self._streams)
        self._listeners[other].connected(far)
        return places[0], near

    # --- for experiments --------------------------------------------------------------------------------------------------

    def end(self, name: InstanceId) -> None:
        """A process ends: its streams break, nobody listens any more, and nothing that it does afterwards gets out."""
        self._listeners.pop(name, None)
        for stream in [each for each in self._streams if each.owner == name]:
            stream.break_off()

    def cut(self, one: InstanceId, other: InstanceId, *, seconds: float) -> None:
        """Nothing passes between these two for that long."""
        self._cut_until[one, other] = self._cut_until[other, one] = trio.current_time() + seconds

    def cut_until(self, sender: InstanceId, receiver: InstanceId) -> float:
        """When something passes from one to another again."""
        return self._cut_until.get((sender, receiver), -math.inf)

    def draw_delay(self, sender: InstanceId, receiver: InstanceId) -> float:
        """A time on the way."""
        return self._rng.uniform(*self._delay(sender, receiver))


class _Pipe:
    """One direction of a stream. An empty part is its end."""

    def __init__(self, network: StreamNetwork, sender: InstanceId, receiver: InstanceId) -> None:
        self.sender, self.receiver = sender, receiver
        self._network = network
        self._parts: deque[tuple[float, bytes]] = deque()
        self._nbytes = 0
        self._last_at = -math.inf
        self._is_finished = False
        self._is_untaken = False
        self._changed = trio.Event()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _put(self, data: bytes) -> None:
        self._last_at = max(self._last_at, trio.current_time() + self._network.draw_delay(self.sender, self.receiver))
        self._parts.append((self._last_at, data))
        self._nbytes += len(data)
        self._change()

    async def send(self, data: bytes) -> None:
        """Put bytes on the way, once there is room."""
        await trio.lowlevel.checkpoint()
        while self._nbytes > WINDOW_NBYTES and not self._is_finished and not self._is_untaken:
            await self._changed.wait()
        if self._is_finished:
            raise trio.ClosedResourceError
        if self._is_untaken:
            raise trio.BrokenResourceError("the other end is closed")
        if data:
            self._put(data)

    async def receive(self, max_nbytes: int) -> bytes:
        """What has arrived, once anything has; empty at the end."""
        await trio.lowlevel.checkpoint()
        while (at := self._arrival()) > trio.current_time():
            if self._is_untaken:
                raise trio.ClosedResourceError
            with trio.CancelScope(deadline=at):
                await self._changed.wait()
        if self._is_untaken:
            raise trio.ClosedResourceError
        at, data = self._parts[0]
        if len(data) > max_nbytes:
            self._parts[0] = (at, data[max_nbytes:])
        elif data:
            self._parts.popleft()
        taken = data[:max_nbytes]
        self._nbytes -= len(taken)
        self._change()
        return taken

    def _arrival(self) -> float:
        """When the next part is there, as far as is known now."""
        if not self._parts:
            return math.inf
        return max(self._parts[0][0], self._network.cut_until(self.sender, self.receiver))

    def finish(self) -> None:
        """Nothing more is sent."""
        if not self._is_finished:
            self._is_finished = True
            self._put(b"")

    def refuse(self) -> None:
        """Nothing more is taken."""
        self._is_untaken = True
        self._change()


class MemoryStream(trio.abc.Stream):
    """One end of a stream."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe, living: "dict[MemoryStream, None]") -> None:
        self.owner = outgoing.sender
        self._incoming, self._outgoing = incoming, outgoing
        self._living = living
        living[self] = None

    def __repr__(self) -> str:
        return f"{self.owner} to {self._outgoing.receiver}"

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As trio's."""
        await self._outgoing.send(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        """As trio's."""
        await self._outgoing.send(b"")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As trio's."""
        return await self._incoming.receive(max_bytes or WINDOW_NBYTES)

    async def aclose(self) -> None:
        """As trio's."""
        self.break_off()
        await trio.lowlevel.checkpoint()

    def break_off(self) -> None:
        """Close at once; what was sent still arrives."""
        self._living.pop(self, None)
        self._outgoing.finish()
        self._incoming.refuse()


class MemoryListener(trio.abc.Listener[MemoryStream]):
    """Takes connections to one instance."""

    def __init__(self, on_close: Callable[[], object]) -> None:
        self._on_close = on_close
        self._into, self._waiting = trio.open_memory_channel[MemoryStream](math.inf)

    def connected(self, stream: MemoryStream) -> None:
        """Somebody has connected."""
        self._into.send_nowait(stream)

    async def accept(self) -> MemoryStream:
        """As trio's."""
        return await self._waiting.receive()

    async def aclose(self) -> None:
        """As trio's."""
        self._on_close()
        await self._waiting.aclose()

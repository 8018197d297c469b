"""Memory whose pages are there before it is needed, for lanes that receive.

To fault in fresh memory costs more than all else that a lane does: 23 ms for 32 MiB, which a warm map receives in 9 to 12. So
memory of the sizes that were taken last is made ahead, as much as the limit allows, and its map is kept: a new map of the same
pages would fault again. Who never took any holds none. Nothing comes back: what was taken is sealed for good, or closed.

All but the faulting itself happens on the event loop, so nothing here needs a lock.
"""

import ctypes
import math
import mmap
import os
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import dataclass

import trio

from p2pkv.store import memory

LEAST_NBYTES = 256 * 1024
"""Smaller memory isn't made ahead: its faults cost less than 0.2 ms, and the descriptors are few."""
COUNT_MAX = 64
"""Pieces of memory that are kept at most, two descriptors each: the map has one of its own."""
STRIDE_NBYTES = 2**20
"""Faulted in by one call. For its 0.8 ms nobody else can map or unmap anything; and so soon a filling ends when cancelled."""
QUIET_S = 0.1
"""Nothing is faulted in until so long after the last take: a lane that receives shard after shard needs the processors, and
takes one every 10 to 30 ms."""

_MADV_POPULATE_WRITE = 23
"""`linux/mman.h`; `mmap` lacks it. Kernels before 5.14 do too, and refuse it."""
_libc = ctypes.CDLL(None)  # gives up the GIL, which `mmap.madvise` keeps for as long as the faults take


@dataclass(frozen=True, slots=True)
class WarmMemory:
    """A memfd as `memory.create` makes it, all its pages faulted in, and mapped for writing.

    Attributes:
        descriptor: Its memfd, which the map doesn't need.
        map: Of all of it. While it is open the memfd can't be sealed against writing. To close it takes 4 ms for 32 MiB,
            without the GIL.
    """

    descriptor: int
    map: mmap.mmap

    @classmethod
    def create(cls, nbytes: int) -> "WarmMemory":
        """Make it, its pages yet to come; `nbytes` are whole pages."""
        descriptor = memory.create(nbytes)
        try:
            return cls(descriptor, mmap.mmap(descriptor, nbytes))
        except OSError:
            os.close(descriptor)
            raise

    def fault_in(self, start: int) -> None:
        """Fault in the next `STRIDE_NBYTES` from `start`, without the GIL.

        Raises:
            OSError: There is no memory for them.
        """
        nbytes = min(STRIDE_NBYTES, len(self.map) - start)
        os.posix_fallocate(self.descriptor, start, nbytes)  # a failure is an error here, where a fault would be a signal
        first = ctypes.c_char.from_buffer(self.map, start)
        _libc.madvise(ctypes.byref(first), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)  # refused: the lane maps these pages

    def close(self) -> None:
        """Free it."""
        self.map.close()
        os.close(self.descriptor)


class PrefaultedMemory:
    """Keeps memory ready, of the sizes taken last.

    Args:
        limit_nbytes: Of all memory kept ready, and being made ready; 0 for none.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self._limit_nbytes = limit_nbytes
        self._taken_nbytes: deque[int] = deque(maxlen=COUNT_MAX)
        self._ready: deque[WarmMemory] = deque()  # oldest first
        self._taken_at = -math.inf
        self._was_taken = trio.Event()
        self._one_thread = trio.CapacityLimiter(1)

    @property
    def nbytes(self) -> int:
        """Memory kept ready, in whole pages."""
        return sum(len(each.map) for each in self._ready)

    @property
    def descriptor_count(self) -> int:
        """Descriptors of what is kept ready."""
        return 2 * len(self._ready)

    def take(self, nbytes: int) -> WarmMemory | None:
        """Memory for `nbytes`, the caller's from now on; None when none of its size is ready.

        Either way as much is made ready for another time.
        """
        nbytes = memory.page_rounded(nbytes)
        if not LEAST_NBYTES <= nbytes <= self._limit_nbytes:
            return None
        self._taken_nbytes.append(nbytes)
        self._taken_at = trio.current_time()
        self._was_taken.set()
        for each in self._ready:
            if len(each.map) == nbytes:
                self._ready.remove(each)
                return each
        return None

    async def keep_ready(self) -> None:
        """Make memory ready whenever some was taken, in one thread, until cancelled.

        Raises:
            OSError: The system has no more memory, or no more descriptors. What is ready stays so.
        """
        while True:
            missing = self._wanted()
            missing.subtract(len(each.map) for each in self._ready)
            unwanted = next((each for each in self._ready if missing[len(each.map)] < 0), None)
            wanted_nbytes = next((nbytes for nbytes, count in missing.items() if count > 0), None)
            if unwanted is not None:  # first, as what is wanted needs its room
                self._ready.remove(unwanted)
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(unwanted.close, limiter=self._one_thread)
            elif wanted_nbytes is not None:
                await self._make_ready(wanted_nbytes)
            else:
                self._was_taken = trio.Event()
                await self._was_taken.wait()

    def close(self) -> None:
        """Free what is ready."""
        while self._ready:
            self._ready.pop().close()

    def _wanted(self) -> Counter[int]:
        """How many of each size to have ready: those taken last, as far as the limit goes."""
        wanted: Counter[int] = Counter()
        room_nbytes = self._limit_nbytes
        for nbytes in reversed(self._taken_nbytes):
            room_nbytes -= nbytes
            if room_nbytes < 0:
                break
            wanted[nbytes] += 1
        return wanted

    async def _wait_until_quiet(self) -> None:
        while (quiet_at := self._taken_at + QUIET_S) > trio.current_time():  # noqa: ASYNC110 - a time, which takes put off
            await trio.sleep_until(quiet_at)

    async def _make_ready(self, nbytes: int) -> None:
        with ExitStack() as stack:
            made = WarmMemory.create(nbytes)
            stack.callback(made.close)
            for start in range(0, nbytes, STRIDE_NBYTES):
                await self._wait_until_quiet()
                await trio.to_thread.run_sync(made.fault_in, start, limiter=self._one_thread)
            self._ready.append(made)
            stack.pop_all()

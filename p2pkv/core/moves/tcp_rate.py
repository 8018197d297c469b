"""How fast bytes come to this node over TCP, as its own fetches show."""

from math import inf

FIRST_BYTES_PER_S = 2.0**30
"""When none has shown it lately: the least that one stream brought on loopback (1.0 to 3.2 GiB/s), and what fills 10 Gbit/s."""
LEAST_NBYTES = 2**24
"""Of a fetch that says anything: 16 MiB take 16 ms at that rate, of which opening the lane is a small part."""
WEIGHT = 0.25
"""Of the latest fetch in the moving average: four fetches after a network has changed, the average has come most of the way."""
KEPT_S = 60.0
"""Then the rate is tried anew: where a slow one keeps fetches from being started, nothing else would show that it has risen."""


class TcpRate:
    """A moving average over the fetches that were large enough to tell."""

    def __init__(self) -> None:
        self._bytes_per_s = FIRST_BYTES_PER_S
        self._learned_at = -inf

    def bytes_per_s(self, now: float) -> float:
        """What a fetch is expected to bring."""
        return self._bytes_per_s if now < self._learned_at + KEPT_S else FIRST_BYTES_PER_S

    def learn(self, nbytes: int, seconds: float, now: float) -> None:
        """A fetch has brought `nbytes` in `seconds`."""
        if nbytes >= LEAST_NBYTES and seconds > 0:
            known = self.bytes_per_s(now)
            self._bytes_per_s, self._learned_at = known + WEIGHT * (nbytes / seconds - known), now

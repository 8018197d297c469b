"""How fast bytes come to this node over TCP, as its own fetches show."""

FIRST_BYTES_PER_S = 2.0**30
"""Until one has been seen: the least that one stream brought on loopback (1.0 to 3.2 GiB/s), and what fills 10 Gbit/s."""
LEAST_NBYTES = 2**24
"""Of a fetch that says anything: 16 MiB take 16 ms at that rate, of which opening the lane is a small part."""
WEIGHT = 0.25
"""Of the latest fetch in the moving average: four fetches after a network has changed, the average has come most of the way."""


class TcpRate:
    """A moving average over the fetches that were large enough to tell."""

    def __init__(self) -> None:
        self.bytes_per_s = FIRST_BYTES_PER_S

    def learn(self, nbytes: int, seconds: float) -> None:
        """A fetch has brought `nbytes` in `seconds`."""
        if nbytes >= LEAST_NBYTES and seconds > 0:
            self.bytes_per_s += WEIGHT * (nbytes / seconds - self.bytes_per_s)

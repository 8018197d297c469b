"""What the first seeds of each scenario add up to, run once for all tests."""

from functools import cache
from os import cpu_count

from sims.batch import Totals, run_batch

SEEDS = {
    "apart": 24,
    "calm": 20,
    "clogged": 4,
    "crashes": 60,
    "crossing": 8,
    "crowded": 20,
    "engines": 12,
    "half_lost": 8,
    "long": 3,
    "lossy": 40,
    "moves": 40,
    "peer_fetch": 20,
    "racks": 12,
    "restarts": 8,
    "set_back": 16,
    "short_log": 20,
    "silent": 8,
    "slow": 12,
    "zones": 12,
}


@cache
def totals(name: str) -> Totals:
    """Run a scenario's first `SEEDS` on all cores."""
    return run_batch(name, range(SEEDS[name]), processes=cpu_count() or 1)

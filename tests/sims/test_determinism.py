import os
import subprocess
import sys

import pytest

from sims.scenario import scenario_names

SEEDS = 3
PRINT_TRACES = """
import sys
from sims.batch import run_one
for seed in range(int(sys.argv[2])):
    print(run_one(sys.argv[1], str(seed), mutant=None).trace)
"""


def traces(name: str, hash_seed: str) -> list[str]:
    """Digests of all that happened in the first seeds of a scenario, in a process of its own."""
    command = [sys.executable, "-c", PRINT_TRACES, name, str(SEEDS)]
    environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.split()


SLOW_TO_RUN = {"clogged", "half_lost", "peer_fetch", "racks", "restarts", "set_back", "silent", "slow", "zones"}
SCENARIOS = [
    pytest.param(name, marks=pytest.mark.long if name in SLOW_TO_RUN else ()) for name in scenario_names() if name != "long"
]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_seed_replays_the_same_under_any_hash_seed(name: str) -> None:
    one, other = traces(name, "1"), traces(name, "2")
    assert one == other
    assert len(set(one)) == SEEDS

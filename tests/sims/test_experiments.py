"""Experiments in small: their figures hold, are those of the real machines, and come out the same each time."""

import json
import os
import subprocess
import sys

import pytest

from sims.experiments.broadcast import broadcast
from sims.experiments.catalogue import EXPERIMENTS
from sims.experiments.churn import churn
from sims.experiments.cluster import Cluster
from sims.experiments.convergence import convergence
from sims.experiments.figures import Figure, Findings, percentile
from sims.experiments.lifeguard import false_deaths, no_lifeguard, plain_swim
from sims.experiments.membership import ends
from sims.experiments.partition import partition
from tests.sims.test_tool import sims


def test_all_learn_of_a_killed_member_within_its_bar() -> None:
    cluster = Cluster("killed", 12)
    assert cluster.join() is not None
    found = Findings("membership", 12, 0, ends(cluster, "killed", cluster.crashes, 2.0)[0])
    assert found.missed == []
    assert found["killed: share that learnt"] == 1.0
    assert 0 < (found["killed: known by all, max"] or 0) < 2.0


def test_a_silent_member_is_known_dead_after_its_suspicion_and_no_other() -> None:
    cluster = Cluster("silent", 12)
    cluster.join()
    found = Findings("membership", 12, 0, ends(cluster, "silent", lambda name: cluster.stops(name, 60), 10.0)[0])
    assert found.missed == []
    assert (found["silent: known by all, max"] or 0) > 3.0, "nobody is declared dead before the shortest suspicion is over"


def test_slow_members_cost_no_well_one_its_life_where_plain_swim_declares_some_dead() -> None:
    assert false_deaths(Cluster("a", 10), 5, 120) == 0
    with plain_swim():
        hasty = Cluster("a", 10, timers_of=no_lifeguard)
        hasty.is_hasty = True
        assert false_deaths(hasty, 5, 120) > 0


def test_two_halves_agree_again_within_their_bar() -> None:
    found = partition(0, 8, 15)
    assert found.missed == []
    assert found["apart: all of the other half given up"] is not None
    assert (found["healed: all agree on inventory too"] or 0) > 0


def test_under_churn_all_ends_and_starts_are_known_and_nobody_is_wrongly_given_up() -> None:
    found = churn(0, 25, 15)
    assert found.missed == []
    assert found["share that learnt"] == 1.0


def test_an_inventory_change_reaches_all_in_time() -> None:
    found = convergence(0, 10, 0)
    assert found["1 chunk: share that learnt"] == found["64 chunks: share that learnt"] == 1.0
    assert (found["1 chunk: known by all, max"] or 9) < 1.2
    assert (found["1 chunk: rounds until all know, p99"] or 9) <= 4
    assert (found["1 chunk: times the payload"] or 0) >= 1, "no less can be sent than what was delivered"


def test_a_broadcast_takes_at_least_a_link_and_shows_up_everywhere() -> None:
    found = broadcast(0, 10, 5)
    assert found.missed == []
    assert (found["latency, p50"] or 0) >= 0.1


@pytest.mark.parametrize(
    "arguments",
    [
        ("broadcast", "--nodes", "6", "--seconds", "5"),
        pytest.param(("partition", "--nodes", "6", "--seconds", "10"), marks=pytest.mark.long),
    ],
)
def test_a_seed_gives_the_same_figures_under_any_hash_seed(arguments: tuple[str, ...]) -> None:
    def figures(seed: str, hash_seed: str) -> str:
        command = [sys.executable, "-m", "sims", *arguments, "--seed", seed, "--json"]
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout

    assert figures("1", "1") == figures("1", "2")
    assert json.loads(figures("1", "1"))["figures"] != json.loads(figures("2", "1"))["figures"]


def test_plain_sim_lists_experiments() -> None:
    listed = sims().stdout
    assert all(name in listed for name in EXPERIMENTS)


def test_a_figure_that_misses_its_target_exits_with_1() -> None:
    missed = sims("convergence", "--nodes", "6", "--json")
    assert missed.returncode == 1, "the payload's bar isn't reached today"
    unmet = [each["name"] for each in json.loads(missed.stdout)["figures"] if each["met"] is False]
    assert unmet == ["1 chunk: times the payload"]


def test_a_figure_without_a_value_misses_its_target() -> None:
    assert Figure("a", None, at_most=1.0).is_met is False
    assert Figure("a", None).is_met is None
    assert (Figure("a", 2.0, below=2.0).is_met, Figure("a", 2.0, at_most=2.0).is_met) == (False, True)
    assert Figure("a", 3.0, at_least=2.0).target == "≥ 2"


def test_a_percentile_is_a_value_that_was_seen() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(each) for each in range(1, 101)], 0.99) == 99.0

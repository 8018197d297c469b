"""`python -m sims` as its users meet it."""

import json
import subprocess
import sys

from sims.mutants import MUTANTS
from sims.scenario import scenario_names


def sims(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "sims", *arguments], capture_output=True, text=True, check=False)


def test_without_a_name_it_lists_scenarios_and_mutants() -> None:
    listed = sims()
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in (*scenario_names(), *MUTANTS))


def test_it_runs_seeds_and_prints_what_they_add_up_to() -> None:
    ran = sims("calm", "--seeds", "4", "--processes", "2")
    assert ran.returncode == 0, ran.stderr
    assert "112 done" in ran.stdout


def test_it_runs_as_many_seeds_as_so_many_moves_take() -> None:
    ran = sims("calm", "--moves", "30", "--processes", "1")
    assert ran.returncode == 0, ran.stderr
    assert "calm, 2 seeds" in ran.stdout
    assert "42 / 14" in ran.stdout


def test_a_scenario_without_moves_takes_none() -> None:
    assert sims("clogged", "--moves", "30").returncode == 2


def test_as_json_it_prints_one_object() -> None:
    totals = json.loads(sims("calm", "--seeds", "2", "--processes", "1", "--json").stdout)
    assert totals["seed_count"] == 2
    assert totals["states"] == {"done": 56}
    assert totals["failures"] == {}


def test_a_failure_exits_with_1_and_says_how_to_replay_it() -> None:
    ran = sims("calm", "--seeds", "2", "--first-seed", "5", "--processes", "1", "--mutant", "frees_at_once")
    assert ran.returncode == 1
    assert "seed 5: PromiseBrokenError: T6" in ran.stdout
    assert "./dev sim calm --seed 5 --mutant frees_at_once" in ran.stdout


def test_a_replay_tells_the_story() -> None:
    told = sims("calm", "--seed", "5", "--mutant", "frees_at_once")
    assert told.returncode == 1
    assert "-> Take(" in told.stdout
    assert "ReleaseChunks(" in told.stdout
    assert "Error: T6" in told.stderr


def test_a_replay_of_a_seed_that_keeps_every_promise_shows_its_paths() -> None:
    shown = sims("calm", "--seed", "5")
    assert shown.returncode == 0
    assert "28 done" in shown.stdout
    assert "shared kept" in shown.stdout


def test_what_it_doesnt_know_is_wrong_usage() -> None:
    for arguments in (["moved"], ["calm", "--mutant", "none"], ["calm", "--seeds", "0"]):
        assert sims(*arguments).returncode == 2

import pytest

from sims.batch import run_one
from sims.ledger import PromiseBrokenError
from sims.mutants import MUTANTS

SEEDS = 150
CAUGHT = (AssertionError, KeyError)
"""A broken promise and a broken invariant are AssertionErrors; a machine that has lost track of a move stumbles over it."""


SLOW_TO_CATCH = {"drops_from_a_lost_source", "refutes_nothing", "takes_for_no_move", "waits_for_ever"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SLOW_TO_CATCH else ()) for name in MUTANTS]
)
def test_the_mutant_is_caught(name: str) -> None:
    with pytest.raises(CAUGHT):
        run_seeds(name)


def run_seeds(mutant: str) -> None:
    for seed in range(SEEDS):
        run_one(MUTANTS[mutant].scenario, str(seed), mutant=mutant)


def test_a_mutant_is_gone_afterwards() -> None:
    mutant = MUTANTS["frees_at_once"]
    right = getattr(mutant.owner, mutant.method)
    with pytest.raises(PromiseBrokenError, match="T6"):
        run_one(mutant.scenario, "0", mutant="frees_at_once")
    assert getattr(mutant.owner, mutant.method) is right


def test_each_mutant_says_what_it_does_wrong() -> None:
    assert all(mutant.description for mutant in MUTANTS.values())

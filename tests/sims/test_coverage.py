"""The scenarios keep every promise, and go down every path: one that is never put to the test isn't kept, only unbroken."""

from collections import Counter
from functools import cache

import pytest

from sims.scenario import scenario_names
from sims.sightings import Phase, Role
from tests.sims.runs import SEEDS, totals

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", scenario_names())
def test_every_scenario_keeps_every_promise(name: str) -> None:
    assert totals(name).failures == {}
    assert totals(name).seed_count == SEEDS[name]


@cache
def paths() -> Counter[str]:
    """How often the seeds of all scenarios together went down each path."""
    seen: Counter[str] = Counter()
    for name in SEEDS:
        seen += totals(name).paths
        seen += Counter({f"ownership ended: {how}": count for how, count in totals(name).ends.items()})
        seen += Counter({f"move: {state}": count for state, count in totals(name).states.items()})
    return seen


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ENDED], ids=lambda each: each.name.lower())
@pytest.mark.parametrize("role", list(Role))
def test_each_end_of_a_move_crashes_in_each_phase(role: Role, phase: Phase) -> None:
    assert paths()[f"{role} crashed while {phase.name.lower()}"]


@pytest.mark.parametrize("role", [Role.TARGET, Role.COORDINATOR])
def test_the_others_leave_in_the_middle_of_a_move(role: Role) -> None:
    assert any(paths()[f"{role} left while {phase.name.lower()}"] for phase in Phase)


@pytest.mark.parametrize("state", ["done", "partial", "failed", "cancelled", "orphaned"])
def test_moves_end_in_every_state(state: str) -> None:
    assert paths()[f"move: {state}"]


@pytest.mark.parametrize("how", ["moved", "evicted", "crashed", "left"])
def test_ownership_ends_in_every_way(how: str) -> None:
    assert paths()[f"ownership ended: {how}"]


@pytest.mark.parametrize(
    "path",
    [
        "already there",
        "answer to a closed attempt",
        "attempt closed unanswered",
        "booted by a clock set back",
        "engine stored outgoing",
        "gone answer",
        "lane failed",
        "later attempt",
        "lookup waited",
        "lookup waited in vain",
        "manifest page",
        "move ended: instance_unreachable",
        "move ended: leaving",
        "move ended: store_full",
        "move ended: transfer_failed",
        "past the log",
        "owned after the source's end",
        "pin moved along",
        "pinned",
        "refused before a byte moved",
        "request refused: deadline_exceeded",
        "request refused: instance_unreachable",
        "shared kept",
        "take repeated",
        "unpinned",
    ],
)
def test_the_path_is_gone_down(path: str) -> None:
    assert paths()[path]

import pytest

from sims.scenario import Scenario, ScenarioError, load_scenario, parse_scenario, scenario_names
from tests.sims.runs import SEEDS, totals


def test_a_calm_cluster_moves_everything() -> None:
    assert totals("calm").states == {"done": 28 * SEEDS["calm"]}
    assert set(totals("calm").ends) == {"moved"}
    assert (totals("calm").lost_count, totals("calm").repeated_count) == (0, 0)


def test_every_scenario_says_what_happens_in_a_line() -> None:
    for name in scenario_names():
        assert 0 < len(load_scenario(name).description) < 110


def test_a_scenario_needs_no_more_than_a_description() -> None:
    assert parse_scenario("description: quiet", "quiet.yaml") == Scenario(description="quiet")


def test_all_problems_of_a_scenario_are_named_at_once() -> None:
    text = "description: x\ncapacity: none\nfaults: {loss: 1.5, los: 0.1}\nblows: {crashes: -1}"
    with pytest.raises(ScenarioError) as raised:
        parse_scenario(text, "broken.yaml")
    for part in ("broken.yaml", "capacity", "faults.loss", "faults.los:", "blows.crashes"):
        assert part in str(raised.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "3"])
def test_what_is_no_scenario_is_refused(text: str) -> None:
    with pytest.raises(ScenarioError, match=r"broken\.yaml"):
        parse_scenario(text, "broken.yaml")


def test_an_unknown_scenario_is_refused_by_name() -> None:
    with pytest.raises(ScenarioError, match=r"'moved'.*moves"):
        load_scenario("moved")

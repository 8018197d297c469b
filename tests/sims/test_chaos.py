"""The ledger of chaos, its prompts, and a short run of the real thing."""

from random import Random

import pytest
import torch

from sims.chaos import run
from sims.chaos.ledger import Ledger
from sims.chaos.prompts import Prompt, guarded_prompts, is_right
from tests.core.builders import NAMESPACE

CHUNK = 7


def ledger_with(*holders: str) -> Ledger:
    ledger = Ledger()
    ledger.begin({CHUNK: frozenset(holders)})
    return ledger


def held_at(*names: str) -> dict[str, frozenset[int]]:
    return {name: frozenset({CHUNK} if name in names else ()) for name in "abcd"}


# --- the ledger -----------------------------------------------------------------------------------------------------------


def test_what_is_where_it_was_is_held() -> None:
    assert ledger_with("a").look(held_at("a")).held == 1


def test_what_nobody_has_and_nobody_was_killed_with_is_lost() -> None:
    ledger = ledger_with("a")
    ledger.killed("b")
    assert ledger.look(held_at()).lost == {CHUNK: ("a",)}


def test_what_a_killed_instance_had_is_excused() -> None:
    ledger = ledger_with("a")
    ledger.killed("a")
    look = ledger.look(held_at())
    assert (look.held, look.excused, look.lost) == (0, 1, {})


@pytest.mark.parametrize("everything", [False, True])
def test_moves_lead_on_whatever_their_order(everything: bool) -> None:
    ledger = ledger_with("a")
    for source, target in (("b", "c"), ("a", "b")):
        ledger.moved(None if everything else [CHUNK], source, target)
    assert ledger.look(held_at("c")).held == 1
    assert ledger.look(held_at("d")).lost == {CHUNK: ("a", "b", "c")}
    ledger.killed("c")
    assert ledger.look(held_at("d")).excused == 1


def test_other_chunks_moves_lead_nowhere() -> None:
    ledger = ledger_with("a")
    ledger.moved([CHUNK + 1], "a", "b")
    assert ledger.look(held_at("b")).lost == {CHUNK: ("a",)}


def test_each_holder_counts_for_itself() -> None:
    ledger = ledger_with("a", "b")
    ledger.killed("a")
    look = ledger.look(held_at("b"))
    assert (look.held, look.excused) == (1, 1)


def test_a_new_round_begins_with_nothing() -> None:
    ledger = ledger_with("a")
    ledger.killed("a")
    ledger.moved([CHUNK], "a", "b")
    ledger.begin({CHUNK: frozenset("a")})
    assert ledger.look(held_at("b")).lost == {CHUNK: ("a",)}


# --- prompts --------------------------------------------------------------------------------------------------------------


def test_kv_is_told_from_that_of_another_prompt_and_another_place() -> None:
    prompt = Prompt(tuple(range(40)))
    kv = prompt.kv()
    assert is_right(prompt.tokens, kv)
    assert is_right(prompt.tokens, kv[:, :, :17])
    assert not is_right(tuple(range(1, 41)), kv)
    assert not is_right((*range(39), 50), kv)
    assert not is_right(prompt.tokens, torch.roll(kv, 1, dims=2))
    kv[0, 0, 20, 0, 0] = 0.5
    assert not is_right(prompt.tokens, kv)


def test_fingerprints_are_those_of_full_chunks_and_the_rest() -> None:
    tokens = tuple(range(NAMESPACE.chunk_size * 2 + 1))
    found = Prompt(tokens).fingerprints(NAMESPACE)
    assert len(found) == 3
    assert found[:2] == Prompt(tokens[:-1]).fingerprints(NAMESPACE)


def test_guarded_prompts_share_beginnings() -> None:
    prompts = guarded_prompts(20, Random(0))
    assert len({prompt.tokens for prompt in prompts}) == 20
    assert len({prompt.tokens[0] for prompt in prompts}) == 5


# --- the real thing -------------------------------------------------------------------------------------------------------


@pytest.mark.live
@pytest.mark.long
def test_a_round_keeps_every_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROUND_S", 5.0)
    report = run.run_chaos(1.0, seed=0, tell=lambda _: None)
    assert report.violations == [], "\n".join(report.journal)
    assert report.rounds == 1
    assert report.held > 100
    assert report.event_states["done"] > 10


@pytest.mark.live
@pytest.mark.long
def test_what_ends_with_a_kill_that_the_ledger_does_not_know_of_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROUND_S", 5.0)
    monkeypatch.setattr(run, "KILLS", (1, 1))
    monkeypatch.setattr(Ledger, "killed", lambda _self, _name: None)
    report = run.run_chaos(1.0, seed=0, tell=lambda _: None)
    assert any("is lost" in each for each in report.violations)

"""The models of large clusters: they come out the same each time, keep the bounds of their sources, and count what they say."""

import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from p2pkv.core.messages import CHANGE_NBYTES, INVENTORY_PAGE_ENTRIES
from p2pkv.core.rows import FINGERPRINT_MAX, Fingerprints
from sims.__main__ import app
from sims.experiments.catalogue import EXPERIMENTS, MODELLED_MAX, NODES_MAX
from sims.experiments.figures import as_json
from sims.experiments.scale import scale
from sims.scale.epidemic import LINKS, Epidemic, mesh
from sims.scale.filters import Bloom
from sims.scale.relayed import (
    HEAD_NBYTES,
    PART_NBYTES,
    RelayAnswer,
    RelayDigest,
    RelayedChanges,
    answers_nbytes,
    changes_nbytes,
    digests_nbytes,
    relay_codec,
)
from sims.scale.rendezvous import keepers


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(count: int, seed: int) -> Fingerprints:
    return rng(seed).integers(0, FINGERPRINT_MAX, count, np.uint64, endpoint=True)


# --- relayed logs ---------------------------------------------------------------------------------------------------------


def test_changes_spread_as_soon_as_an_epidemic_and_no_sooner() -> None:
    ran = Epidemic(100, rng(1), changes=128).run()
    rounds = ran.rounds_until(1.0)
    assert ran.share_that_learnt == 1.0
    assert len(rounds) == 128
    assert 3 <= min(rounds) <= max(rounds) <= 5
    assert (ran.known[:, 0] == 1).all(), "at first only its origin knows a change"
    assert (ran.known[:, 1] <= 1 + LINKS).all(), "in one round a change goes to neighbours only"
    assert (np.diff(ran.known, axis=1) >= 0).all()


def test_nothing_is_sent_twice_unless_it_was_lost() -> None:
    def given(loss: float) -> tuple[int, int]:
        ran = Epidemic(50, rng(2), loss=loss, changes=64).run()
        parts = [*ran.said.back_parts, *ran.said.last_parts]
        return sum(int(each.sum()) for each in parts), ran.learnt_count

    sent, learnt = given(0.0)
    assert sent == learnt == 64 * 49
    sent, learnt = given(0.2)
    assert 1.1 < sent / learnt < 1.5, "a fifth of what is sent is lost, and sent again"


def test_loss_costs_rounds_but_leaves_nobody_out() -> None:
    whole, lossy = (Epidemic(200, rng(3), loss=loss, changes=64).run() for loss in (0.0, 0.1))
    assert lossy.share_that_learnt == 1.0
    assert max(lossy.rounds_until(1.0)) > max(whole.rounds_until(1.0))


def test_when_all_is_lost_the_run_ends_and_says_so() -> None:
    ran = Epidemic(20, rng(4), loss=1.0, changes=4).run()
    assert ran.learnt_count == 0
    assert ran.rounds_until(1.0) == []


def test_members_have_links_to_others_and_both_ways() -> None:
    for nodes in (6, LINKS + 1, LINKS + 2, 300):
        links = mesh(nodes, LINKS, rng(5))
        assert links.shape == (nodes, min(LINKS, nodes - 1))
        assert (links != np.arange(nodes)[:, None]).all()
        table = np.zeros((nodes, nodes), np.int64)
        np.add.at(table, (np.repeat(np.arange(nodes), links.shape[1]), links.ravel()), 1)
        assert (table == table.T).all()


def test_messages_are_as_long_as_the_codec_makes_them() -> None:
    codec = relay_codec()
    digest = RelayDigest(2**64 - 1, bytes(3 * HEAD_NBYTES))
    assert codec.decode(codec.encode(digest)) == digest
    assert digests_nbytes(np.array([3, 0, 3])) == 2 * len(codec.encode(digest)) + len(codec.encode(RelayDigest(2**64 - 1, b"")))
    assert answers_nbytes(np.array([0]), np.array([0])) == 0, "who has nothing to say is silent"
    assert answers_nbytes(np.array([0]), np.array([2])) == len(codec.encode(RelayAnswer(b"", bytes(2 * HEAD_NBYTES))))
    one = len(codec.encode(RelayedChanges(b"", bytes(PART_NBYTES), bytes(CHANGE_NBYTES * INVENTORY_PAGE_ENTRIES))))
    assert changes_nbytes(np.array([0]), np.array([2]), changes_a_part=INVENTORY_PAGE_ENTRIES) == 2 * one


def test_convergence_beyond_the_full_mesh_is_a_model_and_says_so() -> None:
    found = EXPERIMENTS["convergence"].run(0, 300)
    assert "model" in found.about
    assert found["300 members: share that learnt"] == 1.0
    assert (
        found["300 members: rounds until all know, max"]
        == len(found.curves["300 members: share that knows after each round"]) - 1
    )


def test_all_models_reach_their_targets_but_for_the_bytes_of_few_changes() -> None:
    found = scale(3, 200, 0.0)
    assert {each.name.split(": ", 1)[1] for each in found.missed} == {
        "1 chunk: times the payload",
        "30 chunks: times the payload",
    }
    view = "sparse view, 2 zones of 100 members, 1,000 chunks each"
    assert (found[f"{view}: bytes"] or 0) < 0.6 * (found[f"{view}: bytes of a full view"] or 0)
    assert found["directory, 3 of 200 members a chunk: 1.0% die: places that change"] == pytest.approx(1.0, rel=0.1)


def test_other_experiments_refuse_more_members_than_a_full_mesh_can_have() -> None:
    refused = CliRunner().invoke(app, ["membership", "--nodes", str(NODES_MAX + 1)])
    assert refused.exit_code == 2
    assert f"at most {NODES_MAX} members" in refused.stderr
    assert CliRunner().invoke(app, ["scale", "--nodes", str(MODELLED_MAX + 1)]).exit_code == 2


def test_a_seed_gives_the_same_model_under_any_hash_seed() -> None:
    here, other = (EXPERIMENTS["convergence"].run(seed, 150) for seed in (1, 2))
    command = [sys.executable, "-m", "sims", "convergence", "--nodes", "150", "--seed", "1", "--json"]
    environ = {**os.environ, "PYTHONHASHSEED": "12345"}
    there = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert there.returncode == 1, "the payload's bar isn't reached"
    assert there.stdout.strip() == as_json(here)
    assert here.figures != other.figures


# --- filters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits_a_chunk", [6.0, 10.0])
def test_a_filter_misses_nothing_and_is_wrong_as_often_as_theory_says(bits_a_chunk: float) -> None:
    held, absent = drawn(20_000, 1), drawn(100_000, 2)
    bloom = Bloom(len(held), bits_a_chunk)
    assert not bloom.has(held).any()
    bloom.add(held[:15_000])
    bloom.add(held[15_000:])
    assert bloom.has(held).all()
    assert bloom.nbytes * 8 / len(held) == pytest.approx(bits_a_chunk, rel=0.001)
    assert bloom.has(absent).mean() == pytest.approx(bloom.false_hit_rate(len(held)), rel=0.15)


def test_a_filter_of_nothing_has_nothing() -> None:
    assert not Bloom(0).has(drawn(1000, 3)).any()


# --- the directory --------------------------------------------------------------------------------------------------------


def test_a_chunk_has_different_keepers_the_same_for_whoever_asks() -> None:
    chunks, members = drawn(2000, 4), drawn(50, 5)
    kept_by = keepers(chunks, members)
    assert all(len(set(each)) == 3 for each in kept_by.tolist())
    order = rng(6).permutation(len(members))
    assert (members[order][keepers(chunks, members[order])] == members[kept_by]).all()
    loads = np.bincount(kept_by.ravel(), minlength=len(members))
    assert loads.max() < 1.4 * loads.mean(), "120 each in the mean, five standard deviations are 55"


def test_a_member_that_dies_moves_only_what_it_kept() -> None:
    chunks, members = drawn(2000, 7), drawn(50, 8)
    before = members[keepers(chunks, members)]
    after = members[1:][keepers(chunks, members[1:])]
    had = (before == members[0]).any(axis=1)
    assert 0 < had.sum() < len(chunks)
    assert (before[~had] == after[~had]).all()
    for old, new in zip(before[had].tolist(), after[had].tolist(), strict=True):
        stays = [each for each in old if each != members[0]]
        assert new[:2] == stays, "the others keep their places, and one comes behind them"

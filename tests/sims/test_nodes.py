"""The second level: real nodes over streams in memory keep their promises, and a node without a rule is caught."""

import os
import subprocess
import sys
from random import Random

import pytest
import trio
from trio.testing import MockClock
from typer.testing import CliRunner

from p2pkv.core.ids import Address
from sims.__main__ import app
from sims.experiments.nodes import nodes
from sims.ledger import PromiseBrokenError
from sims.mutants import MUTANTS
from sims.streams import WINDOW_NBYTES, MemoryStream, StreamNetwork
from tests.sims.test_tool import sims

SECONDS = 20.0
A, B = Address("virtual", 1), Address("virtual", 2)
PRINT_TRACE = f"from sims.experiments.nodes import nodes; print(nodes(1, 3, {SECONDS}).trace)"


@pytest.mark.parametrize("seed", [0, 1])
def test_real_nodes_keep_the_promises(seed: int) -> None:
    found = nodes(seed, 4, SECONDS)
    assert found.missed == []
    assert (found["moves: done"] or 0) > 20
    assert (found["killed: known by all"] or 0) > 0
    assert (found["virtual time"] or 0) > SECONDS


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 22))
def test_real_nodes_keep_the_promises_for_many_seeds(seed: int) -> None:
    assert nodes(seed, 3 + seed % 3, 40.0).missed == []


def test_a_node_that_frees_too_early_is_caught() -> None:
    with MUTANTS["frees_at_once"].applied(), pytest.raises(PromiseBrokenError, match=r"M1: .* nobody else holds it"):
        nodes(0, 3, SECONDS)


def test_a_seed_replays_the_same_under_any_hash_seed() -> None:
    def trace(hash_seed: str) -> str:
        command = [sys.executable, "-c", PRINT_TRACE]
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout

    traces = {trace("1"), trace("2")}
    assert len(traces) == 1
    assert str(nodes(2, 3, SECONDS).trace) not in traces.pop()


def test_the_tool_runs_it_and_refuses_too_few_nodes() -> None:
    ran = sims("nodes", "--nodes", "3", "--seconds", "5", "--json")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\n") == 1, "nodes' logs don't mix in"
    refused = CliRunner().invoke(app, ["membership", "--nodes", "4"])
    assert refused.exit_code == 2
    assert "at least 6 members" in refused.stderr


# --- the network of streams -----------------------------------------------------------------------------------------------


def network() -> StreamNetwork:
    return StreamNetwork(Random("streams"), {A: "a", B: "b"}, lambda *_: (0.1, 0.1))


async def connected(between: StreamNetwork) -> tuple[MemoryStream, MemoryStream]:
    listener = between.listen("b")
    place, near = await between.connect("a", [B])
    assert place == B
    assert isinstance(near, MemoryStream)
    return near, await listener.accept()


async def test_who_sends_more_than_is_taken_waits(autojump_clock: MockClock) -> None:
    near, far = await connected(network())
    sent = 0
    with trio.move_on_after(1) as patience:
        while True:
            await near.send_all(bytes(1 << 16))
            sent += 1 << 16
    assert patience.cancelled_caught
    assert sent >= WINDOW_NBYTES
    taken = 0
    while taken < sent:
        taken += len(await far.receive_some())
    assert taken == sent
    with trio.fail_after(1):
        await near.send_all(b"more")


async def test_whoever_waits_is_told_that_its_own_end_is_closed(autojump_clock: MockClock) -> None:
    near, _ = await connected(network())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.aclose)
        with pytest.raises(trio.ClosedResourceError):
            await near.receive_some()
    with pytest.raises(trio.ClosedResourceError):
        await near.wait_send_all_might_not_block()


async def test_bytes_take_their_time_and_the_end_comes_behind_them(autojump_clock: MockClock) -> None:
    near, far = await connected(network())
    began_at = trio.current_time()
    await near.send_all(b"abc")
    await near.aclose()
    assert (await far.receive_some(2), await far.receive_some(), await far.receive_some()) == (b"ab", b"c", b"")
    assert trio.current_time() - began_at == pytest.approx(0.1)
    with pytest.raises(trio.BrokenResourceError):
        await far.send_all(b"d")


async def test_what_is_sent_through_a_cut_arrives_when_it_heals(autojump_clock: MockClock) -> None:
    between = network()
    near, far = await connected(between)
    between.cut("a", "b", seconds=5)
    began_at = trio.current_time()
    await near.send_all(b"late")
    assert await far.receive_some() == b"late"
    assert trio.current_time() - began_at == pytest.approx(5)


async def test_who_connects_through_a_cut_waits(autojump_clock: MockClock) -> None:
    between = network()
    between.listen("b")
    between.cut("a", "b", seconds=5)
    with trio.move_on_after(4) as patience:
        await between.connect("a", [B])
    assert patience.cancelled_caught


async def test_a_process_that_ends_breaks_its_streams_and_is_no_longer_there(autojump_clock: MockClock) -> None:
    between = network()
    near, far = await connected(between)
    between.end("b")
    assert await near.receive_some() == b""
    with pytest.raises(trio.ClosedResourceError):
        await far.send_all(b"a word too many")
    with pytest.raises(ConnectionRefusedError):
        await between.connect("a", [B])

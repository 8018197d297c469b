"""`watch` on `/control`: who is told what, of events here and elsewhere, and what becomes of clients that don't read."""

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed

from p2pkv.core.records import EventState
from p2pkv.net import control
from p2pkv.net.calls import ASK_EVERY_S
from tests.net.controlled import MOVE_DEADLINE_S, Client, ControlledNode, essence, open_controlled_node, pushed

PENDING, RUNNING, DONE, FAILED = EventState.PENDING, EventState.RUNNING, EventState.DONE, EventState.FAILED


@pytest.fixture
async def node() -> AsyncIterator[ControlledNode]:
    async with open_controlled_node() as node:
        yield node


@pytest.fixture
async def client(node: ControlledNode) -> Client:
    return await node.connect()


async def test_a_watch_of_all_pushes_every_change_in_order(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    node.change("before", DONE)
    assert await client.ask(id=1, type="watch") == {"id": 1, "type": "watch"}
    changes = [("x", PENDING, 0), ("y", RUNNING, 0), ("x", RUNNING, 0), ("x", DONE, 3), ("y", FAILED, 0)]
    for event_id, state, moved_count in changes:
        node.change(event_id, state, moved_count=moved_count)
    for event_id, state, moved_count in changes:
        assert essence(await client.receive()) == pushed(event_id, state, moved_count)
    assert await client.is_silent()


async def test_counts_are_pushed_as_they_grow(node: ControlledNode, client: Client, autojump_clock: MockClock) -> None:
    await client.ask(id=1, type="watch")
    for moved_count in range(5):
        node.change("x", RUNNING, moved_count=moved_count)
        assert essence(await client.receive()) == pushed("x", "running", moved_count)


async def test_a_watch_of_one_begins_with_its_state_and_ends_with_its_end(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    node.change("x", PENDING)
    assert await client.ask(id=1, type="watch", event_id="x") == {"id": 1, "type": "watch"}
    node.change("y", DONE)
    node.change("x", RUNNING)
    node.change("x", DONE)
    assert [essence(await client.receive()) for _ in range(3)] == [pushed("x", state) for state in (PENDING, RUNNING, DONE)]
    node.change("x", DONE, moved_count=5)
    assert await client.is_silent()


async def test_a_watch_of_what_has_ended_tells_of_its_end(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    node.change("x", DONE)
    await client.ask(id=1, type="watch", event_id="x")
    assert essence(await client.receive()) == pushed("x", "done")
    assert await client.is_silent()


async def test_a_watch_of_an_unknown_event_is_refused(client: Client, autojump_clock: MockClock) -> None:
    answer = await client.ask(id=1, type="watch", event_id="x")
    assert (answer["id"], answer["type"], answer["error"]) == (1, "error", "unknown_event")


async def test_a_repeated_watch_tells_the_state_again_and_each_change_once(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    node.change("x")
    for number in range(3):
        await client.ask(id=number, type="watch", event_id="x")
        assert essence(await client.receive()) == pushed("x", "running")
    node.change("x", DONE)
    assert essence(await client.receive()) == pushed("x", "done")
    assert await client.is_silent()


async def test_what_is_watched_one_by_one_and_in_all_is_pushed_once(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    node.change("x")
    await client.ask(id=1, type="watch")
    await client.ask(id=2, type="watch", event_id="x")
    assert essence(await client.receive()) == pushed("x", "running")
    node.change("x", DONE)
    assert essence(await client.receive()) == pushed("x", "done")
    assert await client.is_silent()


async def test_every_socket_has_its_own_watches(node: ControlledNode, client: Client, autojump_clock: MockClock) -> None:
    other = await node.connect()
    await client.ask(id=1, type="watch")
    node.change("x", DONE)
    assert essence(await client.receive()) == pushed("x", "done")
    assert await other.is_silent()


async def test_an_event_that_runs_elsewhere_is_asked_for_until_its_end(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    node.change_elsewhere("x", RUNNING)
    await client.ask(id=1, type="watch", event_id="x")
    assert essence(await client.receive()) == pushed("x", "running")
    started = trio.current_time()
    for moved_count in range(1, 4):
        node.change_elsewhere("x", RUNNING, moved_count=moved_count)
        assert essence(await client.receive()) == pushed("x", "running", moved_count)
    node.change_elsewhere("x", DONE)
    assert essence(await client.receive()) == pushed("x", "done")
    assert trio.current_time() - started == pytest.approx(4 * ASK_EVERY_S)
    asked_count = len(node.machine.asked_at)
    assert await client.is_silent()
    assert len(node.machine.asked_at) == asked_count


async def test_nobody_asks_on_for_a_client_that_went_away(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    node.change_elsewhere("x", RUNNING)
    await client.ask(id=1, type="watch", event_id="x")
    await client.websocket.aclose()
    asked_count = len(node.machine.asked_at)
    await trio.sleep(10)
    assert len(node.machine.asked_at) == asked_count


async def test_a_watch_ends_with_an_error_when_its_event_is_forgotten(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    node.change_elsewhere("x", RUNNING)
    await client.ask(id=7, type="watch", event_id="x")
    await client.receive()
    del node.machine.given["x"]
    answer = await client.receive()
    assert (answer["id"], answer["type"], answer["error"]) == (7, "error", "unknown_event")
    assert await client.is_silent()


async def test_a_watch_of_an_event_that_never_ends_ends(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    node.change_elsewhere("x", RUNNING)
    await client.ask(id=7, type="watch", event_id="x")
    await client.receive()
    assert await client.is_silent(MOVE_DEADLINE_S - 1)
    answer = await client.receive()
    assert (answer["id"], answer["type"], answer["error"]) == (7, "error", "deadline_exceeded")
    assert await client.is_silent()


async def test_so_many_single_events_are_watched_at_once(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    for number in range(control.MAX_WATCHES):
        node.change_elsewhere(str(number), RUNNING)
        await client.ask(id=number, type="watch", event_id=str(number))
        await client.receive()
    node.change_elsewhere("more", RUNNING)
    answer = await client.ask(id="more", type="watch", event_id="more")
    assert (answer["type"], answer["error"]) == ("error", "instance_unreachable")


# --- clients that don't read ----------------------------------------------------------------------------------------------


async def test_a_client_that_lags_gets_the_newest_of_each_event(
    node: ControlledNode, client: Client, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(control, "LAGGING_MESSAGES", 10)
    await client.ask(id=1, type="watch")
    for event_id in "abcdefghijklmnopqrst":
        node.change(event_id, PENDING)
    for event_id in "abcdefghijklmnopqrst":
        node.change(event_id, RUNNING)
    for event_id in "abcdefghijklmnopqrst":
        for moved_count in range(100):
            node.change(event_id, RUNNING, moved_count=moved_count)
        node.change(event_id, DONE, moved_count=100)
    pushes = [essence(await client.receive()) for _ in "abcdefghijklmnopqrst"]
    assert sorted(pushes) == [pushed(event_id, "done", 100) for event_id in "abcdefghijklmnopqrst"]
    assert await client.is_silent()


async def test_a_client_that_never_reads_is_cut_off_and_others_go_on(
    node: ControlledNode, client: Client, autojump_clock: MockClock
) -> None:
    stuck = await node.connect(lockstep_stream_pair())
    for each in (stuck, client):
        await each.ask(id=1, type="watch")
    for number in range(10):
        node.change(str(number), DONE)
        assert essence(await client.receive()) == pushed(str(number), "done")
    await trio.sleep(control.STALL_S + 1)
    with pytest.raises(ConnectionClosed):
        await receive_pushes(stuck, 5)
    node.change("last", DONE)
    assert essence(await client.receive()) == pushed("last", "done")


async def test_a_client_that_pauses_misses_no_end(node: ControlledNode, client: Client, autojump_clock: MockClock) -> None:
    slow = await node.connect(lockstep_stream_pair())
    await slow.ask(id=1, type="watch")
    for number in range(50):
        node.change(str(number), DONE)
    for number in range(50):
        await trio.sleep(control.STALL_S - 1)
        assert essence(await slow.receive()) == pushed(str(number), "done")


async def test_replies_that_nobody_reads_are_bounded(
    node: ControlledNode, client: Client, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(control, "QUEUE_NBYTES", 10_000)
    stuck = await node.connect(lockstep_stream_pair())
    with pytest.raises(ConnectionClosed):
        await send_requests(stuck, 90)
    assert (await client.ask(id=1, type="livez"))["type"] == "livez"


async def receive_pushes(client: Client, count: int) -> None:
    for _ in range(count):
        await client.receive()


async def send_requests(client: Client, count: int) -> None:
    for number in range(count):
        await client.send(id=number, type="members")
        await wait_all_tasks_blocked()

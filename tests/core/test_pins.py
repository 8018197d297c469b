"""Pins (protocol rules S7, T11, C3): what they keep, for how long, and where they go."""

from dataclasses import replace
from math import inf

import pytest

from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.core.effects import FetchChunks
from p2pkv.core.events import ClearRequested, EngineAttached, PinRequested
from p2pkv.core.ids import InstanceId, Location, RequestId
from p2pkv.core.keys import Identity, TokenBytes
from p2pkv.core.messages import CommandAnswer, PinRequest, Take, TakeAnswer
from p2pkv.core.records import EventState, Operation, Pinning
from p2pkv.errors import ErrorCode
from tests.core.builders import CPU, IDENTITY, NAMESPACE, at, keys_of, pack, prompt
from tests.core.cluster import CLIENT, Cluster

PINNED = prompt(8)
OTHER = prompt(8, first=100)


def ask(
    cluster: Cluster,
    pinning: Pinning,
    tokens: TokenBytes,
    ttl_s: float,
    *,
    of: InstanceId = "a",
    by: InstanceId = "a",
    location: Location = CPU,
    identity: Identity = IDENTITY,
    model: str | None = None,
) -> RequestId:
    return cluster.ask(
        by, lambda request: PinRequested(request, at(of, location), pinning, ttl_s, tokens, identity, model=model)
    )


def pin(cluster: Cluster, tokens: TokenBytes, ttl_s: float = inf, *, of: InstanceId = "a", by: InstanceId = "a") -> object:
    return cluster.answers[ask(cluster, Pinning.PIN, tokens, ttl_s, of=of, by=by)].value


def unpin(cluster: Cluster, tokens: TokenBytes, ttl_s: float = 0.0, *, of: InstanceId = "a", by: InstanceId = "a") -> object:
    return cluster.answers[ask(cluster, Pinning.UNPIN, tokens, ttl_s, of=of, by=by)].value


def small(*names: InstanceId, capacity: int = 4) -> Cluster:
    """Nodes with room for `capacity` chunks."""
    return Cluster(*names, cpu_limit_nbytes=capacity * PAGE_NBYTES)


def press(cluster: Cluster, name: InstanceId = "a", capacity: int = 4) -> None:
    """Store more than fits: all goes that may go."""
    for number in range(capacity):
        cluster.store(name, prompt(4, first=1000 + 10 * number))
    cluster.run(20.0)  # leases end
    for number in range(capacity):
        cluster.store(name, prompt(4, first=2000 + 10 * number))


# --- what is pinned -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["a", "b"])
def test_what_is_pinned_survives_while_others_are_evicted(by: InstanceId) -> None:
    cluster = small("a", "b")
    cluster.store("a", PINNED)
    cluster.store("a", OTHER)
    assert pin(cluster, PINNED, by=by) == 8
    press(cluster)
    assert (cluster.held_tokens("a", PINNED), cluster.held_tokens("a", OTHER)) == (8, 0)
    assert unpin(cluster, PINNED, by=by) == 8
    press(cluster)
    assert cluster.held_tokens("a", PINNED) == 0


def test_the_longest_prefix_is_pinned_and_nothing_that_reaches_beyond_the_tokens() -> None:
    cluster = small("a", capacity=10)
    cluster.store("a", prompt(6))
    cluster.store("a", prompt(12))
    assert pin(cluster, prompt(10)) == 8
    press(cluster, capacity=10)
    assert cluster.has("a", prompt(12)) == [True, True, False]
    assert cluster.has("a", prompt(6)) == [True, True], "a shorter prompt's last chunk lies inside too"


def test_what_a_pinned_chunk_hangs_on_stays() -> None:
    cluster = small("a")
    cluster.store("a", prompt(12))
    assert pin(cluster, prompt(12)) == 12
    assert unpin(cluster, prompt(8)) == 8
    press(cluster)
    assert cluster.held_tokens("a", prompt(12)) == 12


@pytest.mark.parametrize("tokens", [b"", OTHER, prompt(3)])
def test_nothing_held_is_nothing_pinned(tokens: TokenBytes) -> None:
    cluster = small("a")
    cluster.store("a", PINNED)
    assert pin(cluster, tokens) == 0
    assert unpin(cluster, tokens) == 0


def test_a_pin_is_of_one_salt_and_of_the_model_asked_for() -> None:
    cluster = small("a", capacity=10)
    cluster.ask("a", lambda request: EngineAttached(request, CLIENT + 1, replace(NAMESPACE, model="other"), worker=0))
    cluster.store("a", PINNED)
    for identity, model, pinned in ((Identity(cache_salt="s"), None, 0), (IDENTITY, "other", 0), (IDENTITY, "tiny", 8)):
        request = ask(cluster, Pinning.PIN, PINNED, inf, identity=identity, model=model)
        assert cluster.answers[request].value == pinned


def test_a_store_full_of_pins_refuses_and_says_why() -> None:
    cluster = small("a")
    cluster.store("a", prompt(16))
    cluster.run(20.0)
    assert pin(cluster, prompt(16)) == 16
    lent = cluster.lend("a", OTHER)
    assert lent.failure is not None
    assert lent.failure.code is ErrorCode.STORE_FULL
    assert f"{4 * PAGE_NBYTES} of them by what is pinned" in lent.failure.detail
    assert cluster.held_tokens("a", prompt(16)) == 16


def test_a_move_to_a_place_full_of_pins_is_refused_before_a_byte_moves() -> None:
    cluster = small("a", "b")
    cluster.store("b", prompt(16, first=50))
    cluster.run(20.0)
    assert pin(cluster, prompt(16, first=50), of="b") == 16
    cluster.store("a", PINNED)
    event = cluster.move("a", "b", PINNED)
    assert event.state is EventState.FAILED
    assert event.error is not None
    assert event.error.code is ErrorCode.STORE_FULL
    assert "pinned" in event.error.detail
    assert cluster.effects("b", FetchChunks) == []


def test_what_is_pinned_after_room_was_promised_makes_the_move_fail_and_stays() -> None:
    cluster = small("a", "b", capacity=300)
    cluster.store("b", prompt(1200, first=5000))
    cluster.run(20.0)
    cluster.store("a", prompt(1200))
    fetches = cluster.hold(FetchChunks)
    event_id = cluster.begin("a", "b", prompt(1200))
    assert fetches.seen == 1, "a batch of 240; room for the other 60 is only promised"
    pinned = pin(cluster, prompt(1200, first=5000), of="b")
    assert pinned == 4 * 60
    cluster.release()
    event = cluster.event("a", event_id)
    assert (event.state, event.chunks.shared_kept, event.chunks.failed) == (EventState.PARTIAL, 240, 60)
    assert cluster.held_tokens("b", prompt(1200, first=5000)) == pinned
    cluster.assert_at_rest()


# --- until when -----------------------------------------------------------------------------------------------------------


def test_a_pin_ends_by_itself() -> None:
    cluster = small("a")
    cluster.store("a", PINNED)
    assert pin(cluster, PINNED, 60.0) == 8
    press(cluster)
    assert cluster.held_tokens("a", PINNED) == 8
    cluster.run(45.0)
    press(cluster)
    assert cluster.held_tokens("a", PINNED) == 0


@pytest.mark.parametrize("ttls", [(100.0, 1.0), (1.0, 100.0), (inf, 1.0), (1.0, inf)])
def test_of_several_pins_the_one_that_ends_last_counts(ttls: tuple[float, float]) -> None:
    cluster = small("a")
    cluster.store("a", PINNED)
    assert [pin(cluster, PINNED, ttl_s) for ttl_s in ttls] == [8, 8]
    cluster.run(30.0)
    press(cluster)
    assert cluster.held_tokens("a", PINNED) == 8


def test_one_unpin_ends_all_pins() -> None:
    cluster = small("a")
    cluster.store("a", PINNED)
    pin(cluster, PINNED)
    pin(cluster, PINNED)
    assert unpin(cluster, PINNED) == 8
    assert unpin(cluster, PINNED) == 0, "nothing was pinned any more"
    press(cluster)
    assert cluster.held_tokens("a", PINNED) == 0


def test_an_unpin_may_take_its_time_and_lengthens_nothing() -> None:
    cluster = small("a")
    cluster.store("a", PINNED)
    pin(cluster, PINNED)
    assert unpin(cluster, PINNED, 30.0) == 8
    assert unpin(cluster, PINNED, 1000.0) == 8
    press(cluster)
    assert cluster.held_tokens("a", PINNED) == 8
    cluster.run(15.0)
    press(cluster)
    assert cluster.held_tokens("a", PINNED) == 0


def test_what_went_and_came_back_isnt_pinned() -> None:
    cluster = small("a", "b")
    cluster.store("a", PINNED)
    pin(cluster, PINNED)
    cluster.move("a", "b", PINNED)
    cluster.store("a", PINNED)
    press(cluster)
    assert cluster.held_tokens("a", PINNED) == 0


# --- clear ----------------------------------------------------------------------------------------------------------------


def test_clear_leaves_what_is_pinned_and_what_that_hangs_on() -> None:
    cluster = small("a", capacity=10)
    cluster.store("a", prompt(12))
    cluster.store("a", OTHER)
    cluster.store("a", prompt(4) + pack(77))
    pin(cluster, prompt(8))
    unpin(cluster, prompt(4))
    clear = cluster.ask("a", lambda request: ClearRequested(request, at("a")))
    assert cluster.answers[clear].value == 4 + 8 + 1
    assert cluster.has("a", prompt(12)) == [True, True, False]
    unpin(cluster, prompt(8))
    clear = cluster.ask("a", lambda request: ClearRequested(request, at("a")))
    assert cluster.answers[clear].value == 8
    assert cluster.held_tokens("a", prompt(12)) == 0


# --- moves ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl_s", [inf, 60.0])
def test_a_pin_goes_along_with_a_move(ttl_s: float) -> None:
    cluster = small("a", "b")
    cluster.store("a", PINNED)
    pin(cluster, PINNED, ttl_s)
    cluster.run(15.0)
    assert cluster.move("a", "b", PINNED).state is EventState.DONE
    press(cluster, "b")
    assert cluster.held_tokens("b", PINNED) == 8
    cluster.run(25.0)
    press(cluster, "b")
    assert cluster.held_tokens("b", PINNED) == (8 if ttl_s == inf else 0), "the time that it still had"


def test_a_pin_goes_along_to_where_the_chunk_is_already_and_the_longer_one_counts() -> None:
    cluster = small("a", "b", "c")
    for name, ttl_s in (("a", 5.0), ("c", inf)):
        cluster.store(name, PINNED)
        pin(cluster, PINNED, ttl_s, of=name)
    cluster.store("b", PINNED)
    for source in ("c", "a"):
        assert cluster.move(source, "b", PINNED).chunks.already_there == 2
    cluster.run(20.0)
    press(cluster, "b")
    assert cluster.held_tokens("b", PINNED) == 8


def test_what_is_shared_is_pinned_at_both_ends() -> None:
    cluster = small("a", "b")
    cluster.store("a", PINNED)
    cluster.store("a", prompt(4) + pack(77))
    pin(cluster, PINNED)
    assert cluster.move("a", "b", PINNED).chunks.shared_kept == 1
    for name in ("a", "b"):
        assert unpin(cluster, prompt(4), of=name) == 4


def test_a_copy_isnt_pinned() -> None:
    cluster = small("a", "b")
    cluster.store("a", PINNED)
    pin(cluster, PINNED)
    cluster.move("a", "b", PINNED, operation=Operation.COPY)
    for name in ("a", "b"):
        press(cluster, name)
    assert (cluster.held_tokens("a", PINNED), cluster.held_tokens("b", PINNED)) == (8, 0)


def test_what_a_failed_move_restores_is_pinned_as_before() -> None:
    cluster = small("a", "b")
    cluster.store("a", PINNED)
    pin(cluster, PINNED)
    cluster.lose(TakeAnswer)
    event_id = cluster.begin("a", "b", PINNED)
    cluster.run(15.0)
    assert cluster.event("a", event_id).state is EventState.FAILED
    for name in ("a", "b"):  # the target took them all the same
        press(cluster, name)
        assert cluster.held_tokens(name, PINNED) == 8


def test_what_is_on_its_way_out_is_neither_pinned_nor_unpinned() -> None:
    cluster = small("a", "b")
    cluster.store("a", PINNED)
    cluster.store("a", prompt(4) + pack(77))
    pin(cluster, PINNED)
    cluster.hold(Take)
    event_id = cluster.begin("a", "b", PINNED)
    assert unpin(cluster, PINNED) == 4, "only the chunk that is shared is still here"
    cluster.release()
    assert cluster.event("a", event_id).state is EventState.DONE
    assert unpin(cluster, PINNED, of="b") == 8


def test_a_take_that_is_repeated_says_how_long_the_pin_still_lasts() -> None:
    cluster = small("a", "b")
    cluster.store("a", PINNED)
    pin(cluster, PINNED, 60.0)
    cluster.lose(Take, times=1)
    cluster.begin("a", "b", PINNED)
    cluster.run(1.5)
    takes = cluster.sent("a", Take)
    assert [[each.ttl_s for each in take.pins] for take in takes] == [[60.0, 60.0], [59.0, 59.0]]
    assert [each.key for each in takes[0].pins] == list(reversed(keys_of(PINNED)))


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [PinRequest, CommandAnswer])
def test_a_lost_message_is_repeated_and_the_pin_is_made_once(lost: type[PinRequest | CommandAnswer]) -> None:
    cluster = small("a", "b")
    cluster.store("a", PINNED)
    cluster.lose(lost, times=1)
    request = ask(cluster, Pinning.PIN, PINNED, inf, by="b")
    assert unpin(cluster, PINNED) == (0 if lost is PinRequest else 8)
    assert request not in cluster.answers
    cluster.run(1.5)
    assert cluster.answers[request].value == 8
    assert unpin(cluster, PINNED) == (8 if lost is PinRequest else 0), "the repeat didn't pin it again"


@pytest.mark.parametrize("pinning", list(Pinning))
def test_what_is_unknown_is_refused_by_name(pinning: Pinning) -> None:
    cluster = small("a", "b")
    assert cluster.failure_of(ask(cluster, pinning, PINNED, 1.0, of="nobody")) is ErrorCode.UNKNOWN_INSTANCE
    unknown = ask(cluster, pinning, PINNED, 1.0, of="b", location=Location.LOCAL_DISK)
    assert cluster.failure_of(unknown) is ErrorCode.UNKNOWN_LOCATION
    cluster.lose(PinRequest)
    request = ask(cluster, pinning, PINNED, 1.0, of="b")
    cluster.run(6.0)
    assert cluster.failure_of(request) is ErrorCode.INSTANCE_UNREACHABLE

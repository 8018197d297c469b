"""Proofs on a new link, over websockets on memory streams: only the right key opens it, and nobody else learns anything."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream, wrap_server_stream

from p2pkv.errors import RemoteProtocolError
from p2pkv.net.proof import PROOF_S, Prover
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES
from p2pkv.wire.proof import MAC_NBYTES, MAX_PROOF_NBYTES, NONCE_NBYTES, Step, Who, proof_mac

KEY = bytes(range(32))
DIALER = Prover(KEY, "p2pkv", Who("dialer", 7, (1,)), door="/peer")
ACCEPTOR = replace(DIALER, me=Who("acceptor", 9, (1, 2)))
Change = Callable[[Prover], Prover]


@asynccontextmanager
async def websockets() -> AsyncIterator[tuple[WebSocketConnection, WebSocketConnection]]:
    """The dialer's end and the acceptor's."""
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        ends: list[WebSocketConnection] = []

        async def accept() -> None:
            ends.append(await (await wrap_server_stream(nursery, server, max_message_size=MAX_MESSAGE_NBYTES)).accept())

        async with trio.open_nursery() as opening:
            opening.start_soon(accept)
            stream: Any = client  # annotated as a socket's; any stream will do
            ends.append(await wrap_client_stream(nursery, stream, "localhost", "/peer", max_message_size=MAX_MESSAGE_NBYTES))
        yield ends[0], ends[1]
        nursery.cancel_scope.cancel()


@dataclass
class Outcome:
    """What became of one end's proof."""

    who: Who | None = None
    reason: str = ""


async def take_part(
    prove: Callable[[WebSocketConnection], Awaitable[Who]], websocket: WebSocketConnection, outcome: Outcome
) -> None:
    """As a link does it: whoever refuses closes."""
    try:
        outcome.who = await prove(websocket)
    except RemoteProtocolError as error:
        outcome.reason = str(error)
        await websocket.aclose(1008, "refused")
    except ConnectionClosed as closed:
        outcome.reason = f"closed: {closed.reason and closed.reason.reason}"


async def meet(dialer: Prover, acceptor: Prover) -> tuple[Outcome, Outcome]:
    """What each of two real ends makes of the other."""
    outcomes = Outcome(), Outcome()
    async with websockets() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(take_part, dialer.prove_to_acceptor, near, outcomes[0])
        nursery.start_soon(take_part, acceptor.prove_to_dialer, far, outcomes[1])
    return outcomes


async def frame_of(websocket: WebSocketConnection) -> bytes:
    frame = await websocket.get_message()
    assert isinstance(frame, bytes)
    return frame


# --- the right key --------------------------------------------------------------------------------------------------------


async def test_with_one_key_each_learns_who_the_other_is() -> None:
    dialer, acceptor = await meet(DIALER, ACCEPTOR)
    assert (dialer.who, acceptor.who) == (ACCEPTOR.me, DIALER.me)


async def test_after_it_both_may_send_the_longest_message_at_once() -> None:
    outcomes = Outcome(), Outcome()
    longest = bytes(MAX_MESSAGE_NBYTES)

    async def go_on(
        prove: Callable[[WebSocketConnection], Awaitable[Who]], websocket: WebSocketConnection, outcome: Outcome
    ) -> None:
        await take_part(prove, websocket, outcome)
        await websocket.send_message(longest)
        assert await websocket.get_message() == longest

    with trio.fail_after(30):
        async with websockets() as (near, far), trio.open_nursery() as nursery:
            nursery.start_soon(go_on, DIALER.prove_to_acceptor, near, outcomes[0])
            nursery.start_soon(go_on, ACCEPTOR.prove_to_dialer, far, outcomes[1])
    assert all(outcome.who for outcome in outcomes)


# --- the wrong one --------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Change] = {
    "key": lambda prover: replace(prover, key=bytes(32)),
    "cluster": lambda prover: replace(prover, cluster="other"),
    "door": lambda prover: replace(prover, door="/control"),
    "certificate": lambda prover: replace(prover, certificate_digest=bytes(32)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_another_key_cluster_door_or_certificate_is_refused_with_that_word(change: Change) -> None:
    for dialer, acceptor in ((change(DIALER), ACCEPTOR), (DIALER, change(ACCEPTOR))):
        at_dialer, at_acceptor = await meet(dialer, acceptor)
        assert at_dialer.who is at_acceptor.who is None
        assert "its proof is wrong" in at_acceptor.reason
        assert at_dialer.reason == "closed: refused"


async def test_an_acceptor_tells_who_proves_nothing_a_random_number_and_no_more() -> None:
    outcome = Outcome()
    async with websockets() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(take_part, ACCEPTOR.prove_to_dialer, far, outcome)
        assert len(await frame_of(near)) == NONCE_NBYTES
        await near.send_message(bytes(NONCE_NBYTES + MAC_NBYTES))
        with pytest.raises(ConnectionClosed, match="reason=refused"):
            await near.get_message()
    assert outcome.who is None


async def test_a_dialer_tells_an_impostor_a_random_number_and_a_mac_and_no_more() -> None:
    outcome = Outcome()
    async with websockets() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(take_part, DIALER.prove_to_acceptor, near, outcome)
        await far.send_message(bytes(NONCE_NBYTES))
        assert len(await frame_of(far)) == NONCE_NBYTES + MAC_NBYTES
        await far.send_message(bytes(MAC_NBYTES) + ACCEPTOR.me.encode())
        with pytest.raises(ConnectionClosed, match="reason=refused"):
            await far.get_message()
    assert outcome.who is None


# --- in the middle --------------------------------------------------------------------------------------------------------


@dataclass
class Relay:
    """Somebody between two ends, who sees every frame and may change one."""

    changed_index: int | None = None
    change: Callable[[bytes], bytes] = lambda frame: frame
    seen: list[bytes] = field(default_factory=list)
    outcomes: tuple[Outcome, Outcome] = field(default_factory=lambda: (Outcome(), Outcome()))

    async def run(self) -> None:
        """Let both ends meet."""
        async with websockets() as (near, to_dialer), websockets() as (to_acceptor, far), trio.open_nursery() as nursery:
            nursery.start_soon(take_part, DIALER.prove_to_acceptor, near, self.outcomes[0])
            nursery.start_soon(take_part, ACCEPTOR.prove_to_dialer, far, self.outcomes[1])
            nursery.start_soon(self._carry, to_dialer, to_acceptor)
            nursery.start_soon(self._carry, to_acceptor, to_dialer)

    async def _carry(self, source: WebSocketConnection, target: WebSocketConnection) -> None:
        try:
            while True:
                frame = await frame_of(source)
                self.seen.append(frame)
                is_it = len(self.seen) - 1 == self.changed_index
                await target.send_message(self.change(frame) if is_it else frame)
                if len(self.seen) == 5:
                    await target.aclose()
        except ConnectionClosed:
            await target.aclose(1008, "refused")


STEPS = ["challenge", "claim", "acceptor", "dialer", "welcome"]


async def test_what_passes_between_two_ends_is_these_five_frames_and_never_the_key() -> None:
    relay = Relay()
    await relay.run()
    assert all(outcome.who for outcome in relay.outcomes)
    assert len(relay.seen) == len(STEPS)
    assert max(map(len, relay.seen)) <= MAX_PROOF_NBYTES
    assert not any(KEY in frame for frame in relay.seen)


@pytest.mark.parametrize("step", range(5), ids=STEPS)
@pytest.mark.parametrize("place", [0, 31, 32, -1])
async def test_one_changed_byte_in_any_frame_is_refused(step: int, place: int) -> None:
    def flip(frame: bytes) -> bytes:
        changed = bytearray(frame)
        changed[min(place, len(frame) - 1)] ^= 1
        return bytes(changed)

    relay = Relay(step, flip)
    await relay.run()
    # Whoever the changed frame goes to refuses; of the last one the acceptor learns nothing, and loses the link.
    assert relay.outcomes[0].who is None
    assert relay.outcomes[1].who is None or step == 4


@pytest.mark.parametrize("step", range(5), ids=STEPS)
@pytest.mark.parametrize(
    "change", [lambda frame: frame[:-1], lambda frame: b"", lambda frame: frame + b"\0"], ids=["cut", "empty", "longer"]
)
async def test_a_frame_that_is_cut_or_longer_is_refused(step: int, change: Callable[[bytes], bytes]) -> None:
    relay = Relay(step, change)
    await relay.run()
    assert relay.outcomes[0].who is None


async def test_a_recorded_run_is_worth_nothing_the_next_time() -> None:
    relay = Relay()
    await relay.run()
    _, claim, introduction, _, _ = relay.seen
    at_acceptor, at_dialer = Outcome(), Outcome()
    async with websockets() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(take_part, ACCEPTOR.prove_to_dialer, far, at_acceptor)
        await near.get_message()
        await near.send_message(claim)
    async with websockets() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(take_part, DIALER.prove_to_acceptor, near, at_dialer)
        await far.send_message(relay.seen[0])
        await far.get_message()
        await far.send_message(introduction)
    assert "its proof is wrong" in at_acceptor.reason
    assert "its proof is wrong" in at_dialer.reason


async def test_a_dialers_own_introduction_does_not_welcome_it() -> None:
    relay = Relay(changed_index=4)
    relay.change = lambda _: relay.seen[3][:MAC_NBYTES]
    await relay.run()
    assert relay.outcomes[0].who is None


async def test_an_end_that_is_sent_its_own_proof_back_refuses() -> None:
    at_dialer, at_acceptor = Outcome(), Outcome()
    async with websockets() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(take_part, DIALER.prove_to_acceptor, near, at_dialer)
        await far.send_message(bytes(NONCE_NBYTES))
        claim = await frame_of(far)
        await far.send_message(claim[NONCE_NBYTES:] + DIALER.me.encode())
    async with websockets() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(take_part, ACCEPTOR.prove_to_dialer, far, at_acceptor)
        challenge = await frame_of(near)
        link = (b"p2pkv", b"/peer", b"", challenge, bytes(NONCE_NBYTES))
        await near.send_message(bytes(NONCE_NBYTES) + proof_mac(KEY, Step.CLAIM, *link))  # an insider's, to get so far
        await near.send_message(await frame_of(near))
    assert "its proof is wrong" in at_dialer.reason
    assert "its proof is wrong" in at_acceptor.reason


# --- other nonsense -------------------------------------------------------------------------------------------------------


async def test_an_end_that_says_nothing_has_lost_its_turn(autojump_clock: trio.testing.MockClock) -> None:
    for prove in (DIALER.prove_to_acceptor, ACCEPTOR.prove_to_dialer):
        async with websockets() as (near, _):
            started_at = trio.current_time()
            with pytest.raises(RemoteProtocolError, match="proved nothing within 2 s"):
                await prove(near)
            assert trio.current_time() - started_at == pytest.approx(PROOF_S)


async def test_one_that_goes_on_step_by_step_has_no_more_time_than_that(autojump_clock: trio.testing.MockClock) -> None:
    outcome = Outcome()
    async with websockets() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(take_part, DIALER.prove_to_acceptor, near, outcome)
        await trio.sleep(0.9 * PROOF_S)
        await far.send_message(bytes(NONCE_NBYTES))
        await far.get_message()
        with pytest.raises(ConnectionClosed):
            await far.get_message()
        assert trio.current_time() == pytest.approx(PROOF_S, abs=0.1)
    assert "proved nothing" in outcome.reason


@pytest.mark.parametrize("nonsense", ["text", bytes(MAX_PROOF_NBYTES + 1), bytes(MAX_MESSAGE_NBYTES)])
async def test_text_and_more_than_a_proof_is_long_end_the_connection(nonsense: str | bytes) -> None:
    for prove in (DIALER.prove_to_acceptor, ACCEPTOR.prove_to_dialer):
        outcome = Outcome()
        async with websockets() as (near, far), trio.open_nursery() as nursery:
            nursery.start_soon(take_part, prove, near, outcome)
            try:
                await far.send_message(nonsense)
                while True:
                    await far.get_message()
            except ConnectionClosed:
                pass
        assert outcome.who is None
        assert (
            "no step of a proof" if isinstance(nonsense, str) else f"maximum message size: {MAX_PROOF_NBYTES} "
        ) in outcome.reason


@given(
    st.lists(st.binary(max_size=2 * MAX_PROOF_NBYTES) | st.binary(min_size=64, max_size=64) | st.text(max_size=9), max_size=5)
)
async def test_whatever_a_stranger_sends_he_hears_one_number_and_a_refusal(frames: list[bytes | str]) -> None:
    outcome, heard = Outcome(), list[bytes]()
    async with websockets() as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(take_part, ACCEPTOR.prove_to_dialer, far, outcome)
        with suppress(ConnectionClosed):
            for frame in frames:
                await near.send_message(frame)
            heard.append(await frame_of(near))
            if frames:
                heard.append(await frame_of(near))
            await near.aclose()
    assert outcome.who is None
    assert outcome.reason
    assert [len(frame) for frame in heard] in ([], [NONCE_NBYTES])


def test_a_prover_does_not_show_its_key() -> None:
    assert repr(KEY) not in repr(DIALER)

"""Ends of moves that lie, meddle, or come from elsewhere: nothing is lost, nothing wrong is owned, nobody stumbles."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from p2pkv.core.chunks import Chunk
from p2pkv.core.effects import AdmitStaged, DropStaged, FetchChunks, ReleaseChunks, Retrieved
from p2pkv.core.events import FetchEnded, MoveRequested, RetrieveRequested
from p2pkv.core.ids import EventId, Location
from p2pkv.core.keys import ChunkKey, chunk_key, namespace_digest, root_key
from p2pkv.core.messages import (
    EventReport,
    FetchReport,
    ManifestPage,
    ManifestRequest,
    Offer,
    PlanAnswer,
    PlanRequest,
    Take,
    TakeAnswer,
)
from p2pkv.core.moves import source, target
from p2pkv.core.moves.target import MANIFEST_CHUNKS_MAX
from p2pkv.core.records import ChunkCounts, EventRecord, EventState, Operation, Selection
from p2pkv.errors import ErrorCode
from tests.core.builders import IDENTITY, NAMESPACE, at, chunks_of, event_id, event_record, prompt
from tests.core.solo import ME, Solo

TOKENS = prompt(12)
CHUNKS = tuple(chunks_of(TOKENS))
KEYS = tuple(chunk.key for chunk in CHUNKS)
OTHER = replace(NAMESPACE, model="other", head_dim=2)


# --- a machine as target, and a source that lies --------------------------------------------------------------------------


class Target(Solo):
    """A machine that `a` moves chunks to."""

    def __init__(self) -> None:
        super().__init__(generation=7)
        self.attach()
        self.source = self.join("a", 3)
        self.stranger = self.join("z", 3)
        self.id = event_id("a", ME, "z")

    def offer(self, chunks: tuple[Chunk, ...] = CHUNKS, event: EventId | None = None) -> Offer:
        return Offer(
            event_id=event or self.id,
            source_generation=3,
            target_generation=7,
            operation=Operation.MOVE,
            old_position=at("a"),
            new_position=at(ME),
            namespaces=(NAMESPACE,),
            ticket=b"t" * 32,
            chunk_count=len(chunks),
            num_tokens=12,
            charged_nbytes=sum(chunk.charged_nbytes for chunk in chunks),
            idle_s=0.0,
            deadline_s=60.0,
            chunks=chunks,
        )

    def take(self, attempt: int = 1, released: tuple[ChunkKey, ...] = KEYS, shared: tuple[ChunkKey, ...] = ()) -> Take:
        return Take(self.id, attempt, source_generation=3, target_generation=7, released=released, shared=shared)

    def fetched(self, keys: tuple[ChunkKey, ...] = KEYS) -> None:
        self.happen(FetchEnded(self.id, keys, None))

    def last_report(self) -> FetchReport:
        return self.heard(self.source, FetchReport)[-1]

    def last_answer(self) -> TakeAnswer:
        return self.heard(self.source, TakeAnswer)[-1]


@pytest.mark.parametrize(
    "second",
    [
        replace(CHUNKS[1], key=b"k" * 16),
        replace(CHUNKS[1], parent=b"p" * 16),
        replace(CHUNKS[1], tokens=prompt(4)),
        replace(CHUNKS[1], shard_nbytes=(1,)),
        replace(CHUNKS[1], start=5),
        replace(CHUNKS[1], namespace=namespace_digest(OTHER)),
        CHUNKS[0],
    ],
)
def test_a_manifest_that_lies_is_refused_before_a_byte_moves(second: Chunk) -> None:
    machine = Target()
    machine.say(machine.source, machine.offer((CHUNKS[0], second)))
    report = machine.last_report()
    assert (report.is_complete, report.failed_count) == (True, 2)
    assert report.failure is not None
    assert report.failure.code is ErrorCode.PROTOCOL_ERROR
    assert machine.effects(FetchChunks) == []
    machine.machine.check_at_rest(machine.now)


CANT_BE_MET: dict[str, Callable[[Offer], Offer]] = {
    "more chunks than it says": lambda offer: replace(offer, chunk_count=2),
    "sizes that don't add up": lambda offer: replace(offer, charged_nbytes=offer.charged_nbytes + 1),
    "nothing": lambda offer: replace(offer, chunk_count=0, chunks=()),
    "too much": lambda offer: replace(offer, chunk_count=MANIFEST_CHUNKS_MAX + 1),
    "for another boot": lambda offer: replace(offer, target_generation=6),
    "to another location": lambda offer: replace(offer, new_position=at(ME, Location.LOCAL_DISK)),
    "of an unknown dtype": lambda offer: replace(offer, namespaces=(replace(NAMESPACE, dtype="float13"),)),
    "of no namespace": lambda offer: replace(offer, namespaces=()),
}


@pytest.mark.parametrize("what", CANT_BE_MET)
def test_an_offer_that_cant_be_met_is_refused_before_a_byte_moves(what: str) -> None:
    machine = Target()
    machine.say(machine.source, CANT_BE_MET[what](machine.offer()))
    assert machine.last_report().is_complete
    assert machine.last_report().failure is not None
    assert machine.effects(FetchChunks) == []
    machine.machine.check_at_rest(machine.now)


def test_a_lie_on_a_later_page_is_refused_too() -> None:
    machine = Target()
    machine.say(machine.source, replace(machine.offer(), chunks=CHUNKS[:1]))
    assert machine.heard(machine.source, ManifestRequest) == [ManifestRequest(machine.id, first_index=1)]
    machine.say(machine.source, ManifestPage(machine.id, 1, (replace(CHUNKS[1], key=b"k" * 16),)))
    failure = machine.last_report().failure
    assert failure is not None
    assert failure.detail.startswith("Instance 'a' broke the protocol: chunk 1 of the manifest is wrong: its key doesn't")
    machine.say(machine.source, ManifestPage(machine.id, 1, CHUNKS[1:]))
    assert machine.effects(FetchChunks) == []


@pytest.mark.parametrize("name", [event_id("z", ME, "z"), event_id("a", "z", "z"), "nonsense"])
def test_an_offer_of_a_move_between_others_is_ignored(name: EventId) -> None:
    machine = Target()
    assert machine.say(machine.source, machine.offer(event=name)) == []
    assert machine.say(machine.source, replace(machine.take(), event_id=name)) == []


def test_pages_from_elsewhere_or_out_of_turn_are_ignored() -> None:
    machine = Target()
    machine.say(machine.source, replace(machine.offer(), chunks=CHUNKS[:1]))
    for link, page in (
        (machine.stranger, ManifestPage(machine.id, 1, CHUNKS[1:])),
        (machine.source, ManifestPage(machine.id, 2, CHUNKS[2:])),
        (machine.source, ManifestPage(event_id("a", ME, "z"), 1, CHUNKS[1:])),
    ):
        assert machine.say(link, page) == []
    machine.say(machine.source, ManifestPage(machine.id, 1, CHUNKS[1:]))
    (fetch,) = machine.effects(FetchChunks)
    assert fetch.chunks == CHUNKS
    assert machine.say(machine.source, ManifestPage(machine.id, 3, CHUNKS)) == []


def test_a_repeated_offer_is_answered_with_how_far_it_has_got() -> None:
    machine = Target()
    machine.say(machine.source, machine.offer())
    machine.say(machine.source, machine.offer())
    assert len(machine.effects(FetchChunks)) == 1
    assert not machine.last_report().is_complete


def test_a_lane_that_names_what_wasnt_asked_for_adds_nothing() -> None:
    machine = Target()
    machine.say(machine.source, machine.offer())
    machine.fetched((KEYS[0], b"never asked for "))
    report = machine.last_report()
    assert (report.fetched_count, report.failed_count) == (1, 2)


def test_a_take_that_cant_be_met_is_gone() -> None:
    machine = Target()
    machine.say(machine.source, machine.offer())
    machine.fetched()
    for take in (
        replace(machine.take(), target_generation=6),
        replace(machine.take(), event_id=event_id("a", ME, "z")),
        machine.take(released=(b"never offered   ",)),
    ):
        machine.say(machine.source, take)
        assert machine.last_answer() == TakeAnswer(take.event_id, 1, taken=(), already_there=(), gone=take.released)
    assert machine.effects(AdmitStaged) == []


def test_a_take_before_the_bytes_are_here_is_gone() -> None:
    machine = Target()
    machine.say(machine.source, replace(machine.offer(), chunks=CHUNKS[:1]))
    machine.say(machine.source, machine.take(attempt=1))
    machine.say(machine.source, ManifestPage(machine.id, 1, CHUNKS[1:]))
    machine.say(machine.source, machine.take(attempt=2))
    assert [answer.gone for answer in machine.heard(machine.source, TakeAnswer)] == [KEYS, KEYS]
    machine.fetched()
    machine.say(machine.source, machine.take(attempt=3))
    assert machine.last_answer().taken == KEYS


def test_an_attempt_always_gets_the_same_answer() -> None:
    machine = Target()
    machine.say(machine.source, machine.offer())
    machine.fetched()
    machine.say(machine.source, machine.take(released=KEYS[1:], shared=KEYS[:1]))
    first = machine.last_answer()
    assert set(first.taken) == set(KEYS)
    machine.say(machine.source, machine.take(released=(b"another key     ",)))
    assert machine.last_answer() == first
    assert len(machine.effects(AdmitStaged)) == 3


def test_only_the_source_takes_and_ends() -> None:
    machine = Target()
    machine.say(machine.source, machine.offer())
    machine.fetched()
    assert machine.say(machine.stranger, machine.take()) == []
    machine.say(machine.stranger, EventReport(machine.id, None))
    machine.say(machine.stranger, EventReport(machine.id, event_record(machine.id, EventState.FAILED, source="a", target=ME)))
    machine.say(machine.source, EventReport(machine.id, event_record(machine.id, EventState.RUNNING, source="a", target=ME)))
    assert machine.effects(DropStaged) == []
    machine.say(machine.source, EventReport(machine.id, None))
    assert [drop.key for drop in machine.effects(DropStaged)] == list(reversed(KEYS))
    machine.machine.check_at_rest(machine.now)


def test_after_its_end_a_move_takes_nothing() -> None:
    machine = Target()
    machine.say(machine.source, machine.offer())
    machine.say(machine.source, EventReport(machine.id, None))
    machine.say(machine.source, machine.take())
    assert machine.last_answer().gone == KEYS
    machine.say(machine.source, machine.offer())
    machine.fetched()
    assert machine.effects(AdmitStaged) == []
    machine.machine.check_at_rest(machine.now)


def test_there_is_a_limit_to_moves_that_dont_go_on() -> None:
    machine = Target()
    for _ in range(target.OPEN_MOVES_MAX):
        machine.say(machine.source, replace(machine.offer(event=event_id("a", ME, "z")), chunks=()))
    assert machine.heard(machine.source, FetchReport) == []
    machine.say(machine.source, machine.offer())
    failure = machine.last_report().failure
    assert failure is not None
    assert failure.code is ErrorCode.INSTANCE_UNREACHABLE


# --- a machine as source, and a target that lies --------------------------------------------------------------------------


class Source(Solo):
    """A machine that holds a prompt and moves it to `b`."""

    def __init__(self, operation: Operation = Operation.MOVE) -> None:
        super().__init__(generation=7)
        self.attach()
        self.store(TOKENS)
        self.target = self.join("b", 3)
        self.stranger = self.join("z", 3)
        self.id = self.begin(operation)

    def begin(self, operation: Operation = Operation.MOVE) -> EventId:
        answer = self.answer(
            self.ask(
                lambda request: MoveRequested(request, at(ME), at("b"), operation, Selection.TOKENS, TOKENS, IDENTITY, None)
            )
        )
        assert answer is not None
        assert isinstance(answer.value, EventRecord)
        return answer.value.event_id

    def report(self, *, fetched: int = 3, is_complete: bool = True) -> FetchReport:
        return FetchReport(self.id, is_complete, fetched, 0, 3 - fetched, 96, None, None)

    def answered(self, attempt: int = 1, taken: tuple[ChunkKey, ...] = KEYS) -> TakeAnswer:
        return TakeAnswer(self.id, attempt, taken=taken, already_there=(), gone=())

    def event(self) -> EventRecord:
        event = self.machine.event(self.id)
        assert event is not None
        return event

    def freed(self) -> list[ChunkKey]:
        return [key for release in self.effects(ReleaseChunks) for key in release.keys]


def test_only_the_answer_for_the_open_attempt_frees() -> None:
    machine = Source()
    machine.say(machine.target, machine.answered())
    machine.say(machine.target, machine.report())
    (take,) = machine.heard(machine.target, Take)
    assert (take.attempt, take.source_generation, take.target_generation) == (1, 7, 3)
    for link, answer in (
        (machine.stranger, machine.answered()),
        (machine.target, machine.answered(attempt=2)),
        (machine.target, replace(machine.answered(), event_id=event_id(ME, "b", ME))),
    ):
        assert machine.say(link, answer) == []
    assert machine.freed() == []
    machine.say(machine.target, machine.answered())
    assert machine.freed() == list(reversed(KEYS))
    assert machine.event().state is EventState.DONE


def test_an_answer_that_names_other_keys_frees_nothing_else() -> None:
    machine = Source()
    machine.store(prompt(4, first=50))
    other = chunks_of(prompt(4, first=50))[0].key
    machine.say(machine.target, machine.report())
    machine.say(machine.target, machine.answered(taken=(KEYS[2], other)))
    assert machine.freed() == [KEYS[2]]
    assert machine.event().chunks == ChunkCounts(found=3, moved=1, failed=2)
    assert machine.held_tokens(TOKENS) == 8
    machine.machine.check_at_rest(machine.now)


def test_a_prefix_stays_when_its_suffix_isnt_taken() -> None:
    """A target that owns the prefix only: the source keeps it too, or its suffix would hang in the air."""
    machine = Source()
    machine.say(machine.target, machine.report())
    machine.say(machine.target, machine.answered(taken=KEYS[:2]))
    assert machine.freed() == []
    assert machine.event().chunks == ChunkCounts(found=3, shared_kept=2, failed=1)
    assert machine.held_tokens(TOKENS) == 12


@pytest.mark.parametrize("operation", Operation)
def test_a_report_of_more_than_was_offered_is_ignored(operation: Operation) -> None:
    machine = Source(operation)
    assert machine.say(machine.target, machine.report(fetched=4)) == []
    machine.say(machine.target, machine.report())
    assert machine.event().chunks.failed == 0


def test_a_report_of_a_move_that_has_ended_is_answered_with_its_end() -> None:
    machine = Source()
    machine.say(machine.target, machine.report(fetched=0))
    assert machine.event().state is EventState.FAILED
    machine.done.clear()
    machine.say(machine.target, machine.report())
    assert machine.heard(machine.target, EventReport) == [EventReport(machine.id, machine.event())]
    unknown = event_id(ME, "b", "z")
    machine.say(machine.target, replace(machine.report(), event_id=unknown))
    assert machine.heard(machine.target, EventReport)[-1] == EventReport(unknown, None)


def test_a_strangers_report_moves_nothing() -> None:
    machine = Source()
    machine.say(machine.stranger, machine.report())
    assert machine.heard(machine.target, Take) == []
    assert machine.event().nbytes == 0


def test_reports_out_of_order_are_no_step_back() -> None:
    machine = Source()
    machine.say(machine.target, machine.report(is_complete=False, fetched=1))
    machine.say(machine.target, machine.report())
    assert machine.say(machine.target, machine.report(is_complete=False, fetched=1)) == []
    assert len(machine.heard(machine.target, Take)) == 1


def test_only_the_target_gets_pages_and_only_those_that_are_there() -> None:
    machine = Source()
    machine.say(machine.stranger, ManifestRequest(machine.id, 0))
    machine.say(machine.target, ManifestRequest(machine.id, 3))
    assert machine.heard(machine.stranger, ManifestPage) == machine.heard(machine.target, ManifestPage) == []
    machine.say(machine.target, ManifestRequest(machine.id, 1))
    assert machine.heard(machine.target, ManifestPage) == [ManifestPage(machine.id, 1, CHUNKS[1:])]


def test_a_lane_is_granted_while_the_move_is_open() -> None:
    machine = Source()
    (offer,) = machine.heard(machine.target, Offer)
    grant = machine.machine.lane_grant(machine.id)
    assert grant is not None
    assert (grant.ticket, grant.keys) == (offer.ticket, frozenset(KEYS))
    machine.say(machine.target, machine.report(fetched=0))
    assert machine.machine.lane_grant(machine.id) is None


def test_no_two_moves_have_the_same_ticket() -> None:
    machine = Source()
    machine.begin()
    first, second = machine.heard(machine.target, Offer)
    assert first.ticket != second.ticket
    assert first.event_id != second.event_id


def plan_request(name: EventId, source_name: str = ME) -> PlanRequest:
    return PlanRequest(name, at(source_name), at("b"), Operation.MOVE, Selection.TOKENS, TOKENS, IDENTITY, None)


@pytest.mark.parametrize(
    "request_",
    [
        plan_request(event_id("b", "b", "z")),
        plan_request(event_id(ME, "z", "z")),
        plan_request(event_id(ME, "b", ME)),
        plan_request("nonsense"),
        plan_request(event_id(ME, "b", "z"), source_name="b"),
    ],
)
def test_a_plan_whose_id_names_others_is_refused(request_: PlanRequest) -> None:
    machine = Source()
    machine.say(machine.stranger, request_)
    (answer,) = machine.heard(machine.stranger, PlanAnswer)
    assert answer.failure is not None
    assert answer.failure.code is ErrorCode.PROTOCOL_ERROR
    assert machine.machine.event(request_.event_id) is None


def test_there_is_a_limit_to_open_moves() -> None:
    machine = Source()
    for _ in range(source.OPEN_MOVES_MAX - 1):
        machine.say(machine.stranger, plan_request(event_id(ME, "b", "z")))
    machine.done.clear()
    machine.say(machine.stranger, plan_request(event_id(ME, "b", "z")))
    (answer,) = machine.heard(machine.stranger, PlanAnswer)
    assert answer.failure is not None
    assert answer.failure.code is ErrorCode.INSTANCE_UNREACHABLE


def test_a_chunk_that_claims_another_place_in_its_prompt_is_refused() -> None:
    target = Target()
    (chunk,) = chunks_of(prompt(4))
    target.say(target.source, target.offer((replace(chunk, start=8),)))
    (report,) = target.heard(target.source, FetchReport)
    assert report.failure is not None
    assert report.failure.code is ErrorCode.PROTOCOL_ERROR


def test_a_key_of_one_namespace_under_another_is_never_found() -> None:
    two_workers = replace(NAMESPACE, world_size=2)
    target = Target()
    target.attach(5, two_workers, worker=1)
    tokens = prompt(4)
    root = root_key(two_workers, IDENTITY)
    chunk = Chunk(chunk_key(root, tokens), root, namespace_digest(NAMESPACE), 0, tokens, (NAMESPACE.shard_nbytes(4),))
    target.say(target.source, target.offer((chunk,)))
    target.fetched((chunk.key,))
    target.say(target.source, target.take(released=(chunk.key,)))
    answer = target.answer(target.ask(lambda number: RetrieveRequested(number, 5, IDENTITY, tokens)))
    assert answer is not None
    assert isinstance(answer.value, Retrieved)
    assert answer.value.num_tokens == 0

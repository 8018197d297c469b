"""The peers' codec: what goes in comes out, and nothing else gets in."""

from dataclasses import dataclass, replace
from math import inf, nan
from typing import get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core import messages
from p2pkv.core.chunks import Chunk
from p2pkv.core.ids import Address, Location, Position
from p2pkv.core.keys import Identity, Media, Namespace
from p2pkv.core.records import (
    ChunkCounts,
    EventRecord,
    EventState,
    HandoffAddress,
    Lane,
    LocationStatus,
    MemberRecord,
    MemberState,
    Operation,
    Pinning,
    Reach,
    Selection,
)
from p2pkv.core.rows import InventoryEntry, pack
from p2pkv.errors import ErrorCode, Failure, RemoteProtocolError
from p2pkv.wire.codec import Codec, peer_codec
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES

EVENT_ID = "move~a~b~c~0123456789abcdef"
OLD, NEW = Position("a", Location.LOCAL_CPU), Position("b", Location.LOCAL_CPU)
FAILURE = Failure(ErrorCode.STORE_FULL, "no room: größer")
NAMESPACE = Namespace("tiny", "0", "float32", layers=4, planes=2, kv_heads=2, head_dim=64, chunk_size=256, world_size=1)
CHUNK = Chunk(key=b"k" * 16, parent=b"p" * 16, namespace=b"n" * 16, start=256, tokens=b"\x01\0\0\0" * 5, shard_nbytes=(5120,))
IDENTITY = Identity(cache_salt="salt", lora="adapter", media=(Media(offset=3, length=4, digest=b"\xff\x00"),))
CHANGES = pack(InventoryEntry(2**64 - 1, Location.LOCAL_DISK, token_count=65536), present=False)
MEMBER = MemberRecord(
    instance="a",
    generation=1_764_000_000_000,
    incarnation=2,
    state=MemberState.ALIVE,
    ws=Address("127.0.0.1", 8002),
    http="http://127.0.0.1:9000",
    transfer=Address("127.0.0.1", 8004),
    handoff=HandoffAddress("boot", "/run/lane.sock"),
    zone="",
    namespaces=(NAMESPACE,),
    locations=(LocationStatus(Location.LOCAL_CPU, chunk_count=1, nbytes=4096, limit_nbytes=5 * 2**30),),
)
RUMOUR = messages.Rumour("b", 2, 2**62 - 1, MemberState.SUSPECT, ws=Address("::1", 1), origin="a")
EVENT = EventRecord(
    event_id=EVENT_ID,
    state=EventState.RUNNING,
    old_position=OLD,
    new_position=NEW,
    operation=Operation.MOVE,
    chunks=ChunkCounts(found=3, moved=1),
    num_tokens=517,
    nbytes=1024,
    lane=Lane.HANDOFF,
    started_at=1_764_000_000.25,
    finished_at=None,
    coordinator="c",
    error=FAILURE,
)
TAKE = messages.Take(
    EVENT_ID,
    1,
    source_generation=1,
    target_generation=2,
    released=(b"k" * 16,),
    shared=(b"s" * 16,),
    pins=(messages.Pin(b"k" * 16, ttl_s=1.5), messages.Pin(b"s" * 16, ttl_s=inf)),
)
PIN_REQUEST = messages.PinRequest(1, Location.LOCAL_CPU, Pinning.PIN, inf, b"\x05\0\0\0", IDENTITY, model="tiny")
EXAMPLES: tuple[messages.Message, ...] = (
    messages.Hello(versions=(1,), cluster="p2pkv", me=MEMBER, members=(MEMBER, MEMBER)),
    messages.Goodbye(FAILURE),
    messages.Leaving(generation=7),
    messages.Rumours((RUMOUR,)),
    messages.MemberTable(is_answer=False, rumours=(RUMOUR, RUMOUR)),
    messages.ProbeRequest(2**64 - 1, "b", generation=2),
    messages.ProbeAnswer(0, Reach.SILENT),
    messages.Status(MEMBER, sequence=3, entry_count=2, entry_sum=2**64 - 1),
    messages.Ping(0),
    messages.Pong(2**64 - 1),
    messages.InventoryRequest(generation=1, sequence=0),
    messages.InventoryDelta(generation=1, first_sequence=1, changes=CHANGES),
    messages.InventoryDigest(generation=1, sequence=4, ranges=bytes(messages.RANGE_NBYTES)),
    messages.RangeRequest(generation=1, first=0, last=2**64 - 1),
    messages.InventoryPage(generation=1, sequence=4, first=0, last=2**64 - 1, entries=CHANGES),
    messages.PlanRequest(EVENT_ID, OLD, NEW, Operation.COPY, Selection.TOKENS, b"\x05\0\0\0", IDENTITY, model=None),
    messages.PlanAnswer(EVENT_ID, EVENT, None),
    messages.Offer(
        event_id=EVENT_ID,
        source_generation=1,
        target_generation=2,
        operation=Operation.MOVE,
        old_position=OLD,
        new_position=NEW,
        namespaces=(NAMESPACE,),
        ticket=b"t" * 32,
        chunk_count=1,
        num_tokens=5,
        charged_nbytes=8192,
        idle_s=0.5,
        deadline_s=600.0,
        chunks=(CHUNK,),
    ),
    messages.ManifestRequest(EVENT_ID, first_index=64),
    messages.ManifestPage(EVENT_ID, first_index=64, chunks=(CHUNK,)),
    messages.FetchReport(
        EVENT_ID,
        is_complete=True,
        fetched_count=1,
        already_there_count=0,
        failed_count=0,
        nbytes=5120,
        lane=Lane.HANDOFF,
        failure=None,
    ),
    TAKE,
    messages.TakeAnswer(EVENT_ID, 1, taken=(b"k" * 16,), already_there=(), gone=()),
    messages.CancelRequest(EVENT_ID),
    messages.EventRequest(EVENT_ID),
    messages.EventReport(EVENT_ID, EVENT),
    messages.ClearRequest(nonce=1, location=Location.LOCAL_CPU),
    PIN_REQUEST,
    messages.CommandAnswer(nonce=1, token_count=12, failure=None),
)


RUMOUR_FIELDS = msgpack.unpackb(peer_codec().encode(messages.Rumours((RUMOUR,))))["rumours"][0]


def test_the_examples_cover_every_message() -> None:
    assert {type(example) for example in EXAMPLES} == set(get_args(messages.Message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: messages.Message) -> None:
    assert peer_codec().decode(peer_codec().encode(message)) == message


def test_on_the_wire_a_message_is_a_map_with_its_name() -> None:
    assert msgpack.unpackb(peer_codec().encode(messages.Ping(5))) == {"type": "ping", "nonce": 5}


def test_a_later_version_may_add_fields() -> None:
    assert peer_codec().decode(msgpack.packb({"type": "ping", "nonce": 5, "since_s": 1.5})) == messages.Ping(5)


def test_an_earlier_version_knows_no_pins() -> None:
    fields = msgpack.unpackb(peer_codec().encode(TAKE))
    del fields["pins"]
    assert peer_codec().decode(msgpack.packb(fields)) == replace(TAKE, pins=())


@pytest.mark.parametrize("ttl_s", [-1.0, nan, -inf])
def test_no_pin_ends_before_it_begins(ttl_s: float) -> None:
    for message in (replace(PIN_REQUEST, ttl_s=ttl_s), replace(TAKE, pins=(messages.Pin(b"k" * 16, ttl_s=ttl_s),))):
        with pytest.raises(RemoteProtocolError, match="ttl_s"):
            peer_codec().decode(peer_codec().encode(message))


@dataclass(frozen=True, slots=True)
class Greeting:
    """A message of another protocol."""

    name: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Parting:
    """Another one."""


def test_other_protocols_use_the_same_codec() -> None:
    codec: Codec[Greeting | Parting] = Codec(Greeting | Parting)
    assert codec.decode(msgpack.packb({"type": "greeting", "name": "ann"})) == Greeting("ann", 1)
    with pytest.raises(RemoteProtocolError, match="no type"):
        codec.decode(peer_codec().encode(messages.Ping(1)))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2], "no map"),
        ({"nonce": 5}, "no type"),
        ({"type": "shutdown"}, "no type"),
        ({"type": ["ping"], "nonce": 5}, "no type"),
        ({"type": "ping"}, "nonce"),
        ({"type": "ping", "nonce": -1}, "nonce"),
        ({"type": "ping", "nonce": 2**63 + 0.5}, "nonce"),
        ({"type": "rumours", "rumours": [{"instance": "../etc"}]}, "rumours.0.instance"),
        ({"type": "rumours", "rumours": []}, "rumours"),
        ({"type": "rumours", "rumours": [RUMOUR_FIELDS] * 65}, "rumours"),
        ({"type": "rumours", "rumours": [{**RUMOUR_FIELDS, "incarnation": 2**62}]}, "rumours.0.incarnation"),
        ({"type": "rumours", "rumours": [{**RUMOUR_FIELDS, "state": "undead"}]}, "rumours.0.state"),
        ({"type": "member_table", "is_answer": True, "rumours": [RUMOUR_FIELDS] * 1026}, "rumours"),
        ({"type": "probe_answer", "nonce": 1, "reach": "maybe"}, "reach"),
        ({"type": "leaving", "generation": b"short"}, "generation"),
        ({"type": "ping", "nonce": msgpack.ExtType(5, b"x")}, "not msgpack within our limits"),
        ({"type": "ping", "nonce": [0] * 5000}, "not msgpack within our limits"),
        ({1: 2}, "not msgpack within our limits"),
    ],
)
def test_what_is_no_message_is_refused_with_a_reason(value: object, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        peer_codec().decode(msgpack.packb(value))


def test_a_message_that_is_too_long_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="limit"):
        peer_codec().decode(bytes(MAX_MESSAGE_NBYTES + 1))


def test_nested_headers_that_promise_long_arrays_cost_nothing() -> None:
    with pytest.raises(RemoteProtocolError):
        peer_codec().decode(b"\xdd\x00\x7f\xff\xff" * 500)


def test_a_refusal_repeats_no_secret() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        peer_codec().decode(msgpack.packb({"type": "offer", "ticket": b"secret" * 50}))
    assert "secret" not in str(caught.value)


def decode_or_refuse(data: bytes) -> None:
    try:
        message = peer_codec().decode(data)
    except RemoteProtocolError:
        return
    assert peer_codec().decode(peer_codec().encode(message)) == message


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    decode_or_refuse(data)


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@given(st.sampled_from(EXAMPLES), st.data())
def test_any_field_may_hold_anything(example: messages.Message, data: st.DataObject) -> None:
    fields = msgpack.unpackb(peer_codec().encode(example))
    name = data.draw(st.sampled_from(sorted(fields)))
    decode_or_refuse(msgpack.packb({**fields, name: data.draw(VALUES)}))


@given(st.sampled_from(EXAMPLES), st.integers(0, 10_000), st.integers(0, 255))
def test_any_flipped_byte_decodes_or_is_refused(example: messages.Message, position: int, byte: int) -> None:
    data = bytearray(peer_codec().encode(example))
    data[position % len(data)] = byte
    decode_or_refuse(bytes(data))


@given(st.sampled_from(EXAMPLES), st.integers(0, 10_000))
def test_any_cut_is_refused(example: messages.Message, length: int) -> None:
    data = peer_codec().encode(example)
    with pytest.raises(RemoteProtocolError):
        peer_codec().decode(data[: length % len(data)])

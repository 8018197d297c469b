"""The codecs of engines and lanes, as `test_codec.py` has it of the peers': what goes in comes out, nothing else gets in."""

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import RemoteProtocolError
from p2pkv.wire.codec import Codec
from p2pkv.wire.engine import EngineReply, EngineRequest, reply_codec, request_codec
from p2pkv.wire.lane import LaneMessage, lane_codec

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))

each_codec = pytest.mark.parametrize(
    ("codec", "union"),
    [(request_codec(), EngineRequest), (reply_codec(), EngineReply), (lane_codec(), LaneMessage)],
    ids=["engine requests", "engine replies", "lane"],
)


def messages(codec: Codec[Any], union: Any) -> st.SearchStrategy[Any]:
    """Messages of any type, as far as msgpack has their numbers."""

    def is_encodable(message: Any) -> bool:
        try:
            codec.encode(message)
        except OverflowError:
            return False
        return True

    return st.from_type(union).filter(is_encodable)


def decode_or_refuse(codec: Codec[Any], data: bytes) -> None:
    try:
        message = codec.decode(data)
    except RemoteProtocolError:
        return
    assert codec.decode(codec.encode(message)) == message


@each_codec
@given(data=st.data())
def test_any_message_comes_back_as_it_was_and_no_part_of_it_is_one(codec: Codec[Any], union: Any, data: st.DataObject) -> None:
    message = data.draw(messages(codec, union))
    encoded = codec.encode(message)
    assert codec.decode(encoded) == message
    with pytest.raises(RemoteProtocolError):
        codec.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@each_codec
@given(garbage=st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(codec: Codec[Any], union: Any, garbage: bytes) -> None:
    decode_or_refuse(codec, garbage)


@each_codec
@given(data=st.data())
def test_any_flipped_byte_decodes_or_is_refused(codec: Codec[Any], union: Any, data: st.DataObject) -> None:
    encoded = bytearray(codec.encode(data.draw(messages(codec, union))))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse(codec, bytes(encoded))


@each_codec
@given(data=st.data())
def test_any_field_may_hold_anything(codec: Codec[Any], union: Any, data: st.DataObject) -> None:
    fields = msgpack.unpackb(codec.encode(data.draw(messages(codec, union))))
    name = data.draw(st.sampled_from(sorted(fields)))
    decode_or_refuse(codec, msgpack.packb({**fields, name: data.draw(VALUES)}))

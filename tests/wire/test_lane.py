"""What lanes say: shards' headers, and how large their frames get."""

from hypothesis import given
from hypothesis.strategies import binary

from p2pkv.wire.frames import MAX_FRAME_DESCRIPTORS
from p2pkv.wire.lane import (
    MAX_FETCH_KEYS,
    MAX_FRAME_NBYTES,
    SHARD_HEADER_NBYTES,
    Descriptors,
    Fetch,
    PassedShard,
    ShardHeader,
    lane_codec,
)

KEY = b"\xff" * 16


@given(binary(min_size=SHARD_HEADER_NBYTES, max_size=SHARD_HEADER_NBYTES))
def test_any_bytes_of_its_size_are_one_header(data: bytes) -> None:
    assert ShardHeader.decode(data).encode() == data


def test_a_header_says_key_worker_and_size() -> None:
    header = ShardHeader(KEY, worker=1023, nbytes=2**40)
    assert ShardHeader.decode(memoryview(header.encode())) == header


def test_the_longest_messages_fit_into_a_lanes_frame() -> None:
    shards = (PassedShard(KEY, worker=1023),) * MAX_FRAME_DESCRIPTORS
    for message in (Descriptors(shards, is_last=False), Fetch((KEY,) * MAX_FETCH_KEYS)):
        assert len(lane_codec().encode(message)) <= MAX_FRAME_NBYTES

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import RemoteProtocolError
from p2pkv.wire.frames import (
    ANCILLARY_NBYTES,
    MAX_FRAME_DESCRIPTORS,
    Frame,
    FrameAssembler,
    encode_frame,
    rights,
)
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a unix socket; every descriptor that a test received must be closed in the end."""
    before = set(Path("/proc/self/fd").iterdir())
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.settimeout(5)
    yield ends
    for end in ends:
        end.close()
    assert set(Path("/proc/self/fd").iterdir()) == before


def receive(connection: socket.socket) -> Frame:
    with FrameAssembler() as assembler:
        while assembler.missing_nbytes:
            data, ancillary, flags, _ = connection.recvmsg(assembler.missing_nbytes, ANCILLARY_NBYTES, socket.MSG_CMSG_CLOEXEC)
            if not data:
                raise RemoteProtocolError("the end")
            assembler.feed(data, ancillary, flags)
        return assembler.take()


def send(connection: socket.socket, payload: bytes, descriptors: list[int]) -> None:
    connection.sendmsg([encode_frame(payload)], rights(descriptors))


def same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5), st.integers(1, 7))
def test_frames_come_out_as_they_went_in_however_they_are_cut(payloads: list[bytes], step: int) -> None:
    stream = b"".join(map(encode_frame, payloads))
    received = []
    assembler = FrameAssembler()
    while stream:
        nbytes = min(step, assembler.missing_nbytes)
        assembler.feed(stream[:nbytes], (), 0)
        stream = stream[nbytes:]
        if not assembler.missing_nbytes:
            received.append(assembler.take().payload)
            assembler = FrameAssembler()
    assert received == payloads


@given(st.binary(max_size=64))
def test_any_bytes_are_part_of_a_frame_or_a_protocol_error(garbage: bytes) -> None:
    assembler = FrameAssembler()
    try:
        for position in range(len(garbage)):
            if not assembler.missing_nbytes:
                break
            assembler.feed(garbage[position : position + 1], (), 0)
    except RemoteProtocolError:
        (nbytes,) = struct.unpack("<I", garbage[:4])
        assert nbytes == 0 or nbytes > MAX_MESSAGE_NBYTES


def test_descriptors_stay_with_their_frame(pair: Pair) -> None:
    files = [os.memfd_create(str(index)) for index in range(3)]
    send(pair[0], b"none", [])
    send(pair[0], b"two", files[:2])
    send(pair[0], b"one", files[2:])
    for payload, expected in ((b"none", []), (b"two", files[:2]), (b"one", files[2:])):
        with receive(pair[1]) as frame:
            assert frame.payload == payload
            assert len(frame.descriptors) == len(expected)
            assert all(map(same_file, frame.descriptors, expected))
            assert not any(map(os.get_inheritable, frame.descriptors))
    for file in files:
        os.close(file)


def test_as_many_descriptors_as_allowed_pass_in_one_frame(pair: Pair) -> None:
    file = os.memfd_create("file")
    send(pair[0], b"many", [file] * MAX_FRAME_DESCRIPTORS)
    with receive(pair[1]) as frame:
        assert len(frame.descriptors) == MAX_FRAME_DESCRIPTORS
    os.close(file)


def test_a_descriptor_that_was_taken_out_of_a_frame_stays_open(pair: Pair) -> None:
    file = os.memfd_create("file")
    send(pair[0], b"two", [file, file])
    with receive(pair[1]) as frame:
        taken = frame.descriptors.pop()
    assert same_file(taken, file)
    os.close(taken)
    os.close(file)


@pytest.mark.parametrize("nbytes", [0, MAX_MESSAGE_NBYTES + 1, 2**32 - 1])
def test_a_frame_of_a_forbidden_size_is_refused_before_its_payload(pair: Pair, nbytes: int) -> None:
    file = os.memfd_create("file")
    pair[0].sendmsg([struct.pack("<I", nbytes)], rights([file]))
    os.close(file)
    with pytest.raises(RemoteProtocolError, match="it must have"):
        receive(pair[1])


def test_more_descriptors_than_allowed_are_refused_and_closed(pair: Pair) -> None:
    file = os.memfd_create("file")
    frame = encode_frame(b"spread over the bytes of a frame")
    for position in range(0, len(frame), 4):
        pair[0].sendmsg([frame[position : position + 4]], rights([file] * 100))
    os.close(file)
    with pytest.raises(RemoteProtocolError, match="at most"):
        receive(pair[1])


def test_descriptors_that_were_cut_off_are_refused_and_the_others_closed(pair: Pair) -> None:
    file = os.memfd_create("file")
    send(pair[0], b"eight", [file] * 8)
    os.close(file)
    with FrameAssembler() as assembler:
        data, ancillary, flags, _ = pair[1].recvmsg(4, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
        assert flags & socket.MSG_CTRUNC
        with pytest.raises(RemoteProtocolError, match="more descriptors"):
            assembler.feed(data, ancillary, flags)


def test_a_claimed_length_alone_costs_no_memory() -> None:
    assembler = FrameAssembler()
    assembler.feed(struct.pack("<I", MAX_MESSAGE_NBYTES), (), 0)
    assert assembler.missing_nbytes <= 256 * 1024

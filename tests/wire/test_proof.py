"""The fixed encoding of proofs: who is told comes back, and any bytes are somebody or refused."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core.ids import is_instance_id
from p2pkv.errors import RemoteProtocolError
from p2pkv.wire.proof import MAC_NBYTES, MAX_PROOF_NBYTES, MAX_VERSIONS, Step, Who, decode_who, proof_mac

PEOPLE = st.builds(
    Who,
    instance=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True).filter(is_instance_id),
    generation=st.integers(0, 2**63 - 1),
    versions=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=MAX_VERSIONS).map(tuple),
)


@given(PEOPLE)
def test_who_is_told_is_who_is_read(who: Who) -> None:
    assert decode_who(who.encode()) == who
    assert MAC_NBYTES + len(who.encode()) <= MAX_PROOF_NBYTES


@given(st.binary(max_size=120) | st.builds(lambda head, rest: head.encode() + rest, PEOPLE, st.binary(max_size=80)))
def test_any_bytes_are_somebody_or_refused(data: bytes) -> None:
    try:
        who = decode_who(data)
    except RemoteProtocolError:
        return
    assert who.encode() == data


@given(PEOPLE, st.data())
def test_a_truncated_introduction_is_never_the_same_person(who: Who, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(who.encode()) - 1))
    with suppress(RemoteProtocolError):
        assert decode_who(who.encode()[:cut]) != who


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(8),
        bytes(9) + b"a",  # no version
        bytes(8) + b"\x11" + bytes(34) + b"a",  # 17 versions
        b"\xff" * 8 + b"\x01\x01\x00a",  # no generation
        bytes(8) + b"\x01\x01\x00",  # no name
        bytes(8) + b"\x01\x01\x00..",
        bytes(8) + b"\x01\x01\x00\xff",
        bytes(8) + b"\x01\x01\x00" + b"a" * 65,
    ],
)
def test_introductions_of_nobody_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_who(data)


def test_a_mac_is_of_one_step_and_of_what_was_told_in_these_pieces() -> None:
    assert len(Step) == 4
    macs = [
        proof_mac(bytes(32), step, *told)
        for step in Step
        for told in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"ab", b"c", b""))
    ]
    assert len(set(macs)) == len(macs)
    assert proof_mac(b"\x01" * 32, Step.CLAIM, b"ab", b"c") not in macs

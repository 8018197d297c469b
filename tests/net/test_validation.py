"""Requests' JSON: a long token list, which is parsed in parts, means what it means in one piece, and no other does."""

import json
from dataclasses import fields
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core.keys import MAX_TOKENS, pack_tokens
from p2pkv.errors import InvalidRequestError
from p2pkv.net.calls import CALLS, LOOKUP, Call
from p2pkv.net.requests import LookupBody
from p2pkv.net.validation import PART_NBYTES, parse_body, parse_texts, take_body

TOKENS = list(range(3 * PART_NBYTES // 6))
TEXT = json.dumps({"tokens": TOKENS, "cache_salt": "s"}).encode()
LAST = b", %d]" % TOKENS[-1]


async def parsed(text: bytes) -> LookupBody:
    return parse_body(LOOKUP.body_adapter, await take_body(text))


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40),
    separator=st.sampled_from([",", ", ", " ,\n\t"]),
    repeats=st.sampled_from([1, 1000]),
)
async def test_any_list_is_its_tokens(tokens: list[int], separator: str, repeats: int) -> None:
    listed = separator.join(map(str, tokens * repeats))
    assert (await parsed(f'{{"cache_salt": "s", "tokens" : [ {listed} ]}}'.encode())).tokens == pack_tokens(tokens * repeats)


async def test_what_stands_beside_a_long_list_counts() -> None:
    assert len(TEXT) > 3 * PART_NBYTES
    body = await parsed(TEXT)
    assert (body.tokens, body.cache_salt, body.model) == (pack_tokens(TOKENS), "s", None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LAST, LAST[:-1] + b",]"),
        (b"[0,", b"[,0,"),
        (b", 7000,", b", ,"),
        (b", 7000,", b", 7 7,"),
        (b", 7000,", b", 07,"),
        (LAST, b", -1]"),
        (LAST, b", 1.0]"),
        (LAST, b", true]"),
        (LAST, b', "1"]'),
        (LAST, b", 2147483648]"),
        (LAST, b", [1]]"),
        (b'"s"}', b'"s"'),
        (b'"s"}', b'"s", "other": 1}'),
        (TEXT, b'{"tokens": [1], "other": ' + TEXT + b"}"),
        (TEXT, b'{"tokens": [1], "cache_salt": ' + json.dumps(TEXT.decode()).encode() + b"}"),
        (TEXT, b'{"tokens": [' + b" " * 2 * PART_NBYTES + b",]}"),
    ],
    ids=[f"case{number}" for number in range(16)],
)
async def test_a_long_list_that_is_none_is_refused(old: bytes, new: bytes) -> None:
    assert old in TEXT
    with pytest.raises(InvalidRequestError):
        await parsed(TEXT.replace(old, new))


@pytest.mark.parametrize(
    ("count", "sentence"), [(MAX_TOKENS + 1, "at most 1048576 tokens"), (2 * MAX_TOKENS, "at most 1048576")]
)
async def test_one_token_too_many_is_refused(count: int, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        await parsed(b'{"tokens": [' + b"1," * (count - 1) + b"1]}")


async def test_others_have_their_turn_while_a_long_list_is_parsed() -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        await parsed(TEXT)
        nursery.cancel_scope.cancel()
    assert turns >= len(TEXT) // PART_NBYTES


# --- anything -------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


async def take_or_refuse(call: Call[Any, Any], text: bytes) -> None:
    try:
        body = parse_body(call.body_adapter, await take_body(text))
    except InvalidRequestError:
        return
    assert isinstance(body, call.body)


@each_call
@given(text=st.binary(max_size=200) | JSON.map(json.dumps).map(str.encode))
async def test_any_bytes_are_a_request_or_are_refused(call: Call[Any, Any], text: bytes) -> None:
    await take_or_refuse(call, text)


@each_call
@given(data=st.data())
async def test_any_values_of_its_fields_are_a_request_or_are_refused(call: Call[Any, Any], data: st.DataObject) -> None:
    names = [each.name for each in fields(call.body)]
    await take_or_refuse(call, json.dumps({name: data.draw(JSON) for name in names}).encode())


@each_call
@given(texts=st.dictionaries(st.sampled_from(["instance", "location", "cursor", "event_id", "x"]), st.text(max_size=30)))
def test_any_texts_are_a_request_or_are_refused(call: Call[Any, Any], texts: dict[str, str]) -> None:
    try:
        body = parse_texts(call.body_adapter, texts)
    except InvalidRequestError:
        return
    assert isinstance(body, call.body)

"""JSON from outside, validated straight from its bytes, with limits that hold before anything is made of it.

It is parsed on the event loop: the parser holds the GIL from beginning to end, so a thread would stall the loop just as long.
Long token lists, which alone make a request long, are therefore parsed first, in parts of `PART_NBYTES`, and the rest then at
once: so no request keeps the loop from its other work for more than some milliseconds.
"""

import re
from dataclasses import dataclass
from typing import TypeVar

import trio
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from p2pkv.core.keys import MAX_TOKEN_ID, MAX_TOKENS, TOKEN_NBYTES, TokenBytes, pack_tokens
from p2pkv.errors import ErrorCode, Failure, InvalidRequestError
from p2pkv.net.requests import MAX_TEXT_LENGTH

MAX_BODY_NBYTES = 16 * 2**20
"""`MAX_TOKENS` token ids of ten digits with a comma and a space each take 12 MiB."""
MAX_SEPARATOR_COUNT = 8 * MAX_TEXT_LENGTH
"""No valid request has more colons, or more commas beside those between tokens: all its texts together are shorter."""
PART_NBYTES = 64 * 2**10
"""Parsed between two looks at the event loop: some 8,000 tokens, 0.5 ms."""
COUNT_STRIDE_NBYTES = 2**20
"""Searched for separators between two looks at the event loop: 1 ms."""
SHOWN_PROBLEMS = 5

B = TypeVar("B")

_TOKEN_LIST = re.compile(rb'"tokens"\s*:\s*\[')  # no text has this: quotes in it are escaped
_IN_A_TOKEN_LIST = b"0123456789, \t\r\n"


@dataclass(frozen=True, slots=True)
class Body:
    """A request as it came.

    Attributes:
        text: Its JSON.
        tokens: Its token list, or what is wrong with that, if it is long and was taken out of `text`.
    """

    text: bytes
    tokens: TokenBytes | ValueError | None = None


async def take_body(text: bytes) -> Body:
    """Prepare a request, at most `MAX_BODY_NBYTES` long, for `parse_body`.

    Raises:
        InvalidRequestError: It has too many fields or tokens.
    """
    await _check_separators(text)
    found = _TOKEN_LIST.search(text)
    end = -1 if found is None else text.find(b"]", found.end())
    if found is None or end - found.end() < PART_NBYTES:
        return Body(text)
    tokens = await _parse_tokens(text, found.end(), end)
    return Body(text[: found.end()] + text[end:], tokens)


def parse_body(adapter: TypeAdapter[B], body: Body) -> B:
    """What a request says.

    Raises:
        InvalidRequestError: It isn't the JSON that `adapter` takes.
    """
    try:
        return adapter.validate_json(body.text, context=body.tokens)
    except ValidationError as error:
        raise refusal(_sentence(error)) from error


def parse_texts(adapter: TypeAdapter[B], fields: dict[str, str]) -> B:
    """The request whose fields came as texts, in a path or a query.

    Raises:
        InvalidRequestError: They aren't what `adapter` takes.
    """
    try:
        return adapter.validate_strings(fields)
    except ValidationError as error:
        raise refusal(_sentence(error)) from error


def refusal(detail: str) -> InvalidRequestError:
    """The error that refuses a request, whoever finds out."""
    return InvalidRequestError(Failure(ErrorCode.INVALID_REQUEST, detail))


async def _check_separators(text: bytes) -> None:
    """Refuse what can't be valid before the parser makes an object of each of millions of tokens or fields."""
    commas = colons = 0
    for start in range(0, len(text), COUNT_STRIDE_NBYTES):
        end = start + COUNT_STRIDE_NBYTES
        commas += text.count(b",", start, end)
        colons += text.count(b":", start, end)
        if end < len(text):
            await trio.lowlevel.checkpoint()
    if commas > MAX_TOKENS + MAX_SEPARATOR_COUNT:
        raise refusal(f"A request takes at most {MAX_TOKENS} tokens.")
    if colons > MAX_SEPARATOR_COUNT:
        raise refusal("The request has too many fields.")


async def _parse_tokens(text: bytes, start: int, end: int) -> TokenBytes | ValueError:
    """The token list between two places of `text`, or what is wrong with it; 7 ms of work for each 100,000 tokens."""
    packed = bytearray()
    try:
        while start < end:
            comma = text.find(b",", start + PART_NBYTES, end)
            part_end = end if comma < 0 else comma
            packed += _parse_part(text[start:part_end])
            start = part_end + 1
            await trio.lowlevel.checkpoint()
    except ValueError as error:
        return error
    if len(packed) > MAX_TOKENS * TOKEN_NBYTES:
        return ValueError(f"at most {MAX_TOKENS} tokens are taken")
    return bytes(packed) if start > end else ValueError("a comma ends the list")


def _parse_part(part: bytes) -> TokenBytes:
    if part.translate(None, _IN_A_TOKEN_LIST) or not part.strip():
        raise ValueError(f"must be a list of integers from 0 to {MAX_TOKEN_ID}")
    return pack_tokens(from_json(b"[%b]" % part))


def _sentence(error: ValidationError) -> str:
    """The first problems found, each with its place: `tokens[3]: Input should be greater than or equal to 0`."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    sentences = []
    for problem in problems[:SHOWN_PROBLEMS]:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
        sentences.append(f"{place}: {problem['msg']}" if place else problem["msg"])
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(sentences) + (f"; and {more} more." if more > 0 else ".")

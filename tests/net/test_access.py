"""What a client may do with the token that it shows."""

import pytest

from p2pkv.net.access import OPEN_CALLS, READING_CALLS, Access, AccessTokens, DoorGuard
from p2pkv.net.calls import CALLS
from p2pkv.net.control import WATCH

CHANGING_CALLS = {"move", "cancel", "clear", "pin", "unpin", "compress", "decompress"}
TOKENS = AccessTokens(full="f" * 64, read_only="r" * 64)


@pytest.mark.parametrize(
    ("authorization", "access"),
    [
        (f"Bearer {'f' * 64}", Access.FULL),
        (f"bearer {'f' * 64}", Access.FULL),
        (f"Bearer {'r' * 64}", Access.READ_ONLY),
        (f"Bearer {'f' * 63}", Access.NONE),
        (f"Bearer {'f' * 65}", Access.NONE),
        (f"Bearer  {'f' * 64}", Access.NONE),
        (f"Basic {'f' * 64}", Access.NONE),
        ("f" * 64, Access.NONE),
        ("Bearer", Access.NONE),
        ("Bearer ", Access.NONE),
        ("Bearer \xff", Access.NONE),
        ("", Access.NONE),
        (None, Access.NONE),
    ],
)
def test_only_a_whole_token_gives_access(authorization: str | None, access: Access) -> None:
    assert TOKENS.access(authorization) is access


def test_where_no_tokens_are_wanted_everybody_has_full_access() -> None:
    assert DoorGuard(frozenset({9000})).access({}) is Access.FULL


def test_every_call_is_known_as_one_that_reads_or_one_that_changes() -> None:
    calls = {*CALLS, WATCH}
    assert calls <= READING_CALLS | CHANGING_CALLS
    assert not READING_CALLS & CHANGING_CALLS


@pytest.mark.parametrize("call", [*sorted(READING_CALLS | CHANGING_CALLS), "not_a_call"])
def test_the_read_only_token_allows_what_changes_nothing(call: str) -> None:
    assert Access.FULL.refuse(call) is None
    refusals = {access: refusal.status for access in Access if (refusal := access.refuse(call)) is not None}
    if call in OPEN_CALLS:
        assert refusals == {}
    elif call in READING_CALLS:
        assert refusals == {Access.NONE: 401}
    else:
        assert refusals == {Access.NONE: 401, Access.READ_ONLY: 403}


@pytest.mark.parametrize(
    ("method", "path", "none", "read_only"),
    [
        ("GET", "/livez", None, None),
        ("GET", "/events", 401, None),
        ("GET", "/events/move~a~b~c~0", 401, None),
        ("DELETE", "/events/move~a~b~c~0", 401, 403),
        ("DELETE", "/events", 401, None),  # there is no such call
        ("POST", "/lookup", 401, None),
        ("POST", "/move", 401, 403),
        ("GET", "/openapi.json", 401, None),
        ("GET", "/no_such_thing", 401, None),
        ("POST", "/no_such_thing", 401, 403),
    ],
)
def test_over_http_the_method_counts_too(method: str, path: str, none: int | None, read_only: int | None) -> None:
    for access, status in ((Access.NONE, none), (Access.READ_ONLY, read_only), (Access.FULL, None)):
        refusal = access.refuse_http(method, path)
        assert (None if refusal is None else refusal.status) == status


def test_tokens_do_not_show_themselves() -> None:
    assert "fff" not in repr(TOKENS)
    assert "rrr" not in repr(DoorGuard(frozenset({1}), tokens=TOKENS))

"""Names, addresses and errors: what is one, and what isn't."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv import errors
from p2pkv.core.ids import EVENT_ID_MAX_LENGTH, Address, Parties, is_instance_id, make_event_id, parse_event_id
from p2pkv.errors import ErrorCode, Failure, FailureError, UnsupportedCacheError, failure_error

names = st.text(alphabet="aZ0._-", min_size=1, max_size=64).filter(is_instance_id)


@pytest.mark.parametrize("name", ["a", "instance1", "A.b_c-9", "x" * 64, ".hidden", "-"])
def test_an_instance_id_is_made_of_letters_digits_and_a_few_signs(name: str) -> None:
    assert is_instance_id(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "a~b", "ä", "a\n", ".", "..", "..."])
def test_what_could_be_mistaken_for_something_else_is_no_instance_id(name: str) -> None:
    assert not is_instance_id(name)


@given(names, names, names, st.integers())
def test_an_event_id_names_its_parties(source: str, target: str, coordinator: str, seed: int) -> None:
    parties = Parties(source, target, coordinator)
    event_id = make_event_id(parties, Random(seed))
    assert parse_event_id(event_id) == parties
    assert len(event_id) <= EVENT_ID_MAX_LENGTH


def test_the_longest_names_fit() -> None:
    longest = "x" * 64
    event_id = make_event_id(Parties(longest, longest, longest), Random("seed"))
    assert len(event_id) == EVENT_ID_MAX_LENGTH


@pytest.mark.parametrize(
    "event_id",
    [
        "",
        "move~a~b~c",
        "move~a~b~c~0123456789abcdef~",
        "copy~a~b~c~0123456789abcdef",
        "move~a~b~..~0123456789abcdef",
        "move~a~~c~0123456789abcdef",
        "move~a~b~c~0123456789ABCDEF",
        "move~a~b~c~0123456789abcde",
        "move~a~b~c~0123456789abcdef\n",
    ],
)
def test_what_isnt_an_event_id_has_no_parties(event_id: str) -> None:
    assert parse_event_id(event_id) is None


def test_an_address_is_written_as_in_a_url() -> None:
    assert str(Address("localhost", 80)) == "localhost:80"
    assert str(Address("::1", 80)) == "[::1]:80"


@pytest.mark.parametrize("code", ErrorCode)
def test_every_failure_has_one_exception_that_says_what_to_do(code: ErrorCode) -> None:
    kinds = [kind for kind in FailureError.__subclasses__() if code in kind.codes]
    failure = Failure(code, "Do this.")
    error = failure_error(failure)
    assert kinds == [type(error)]
    assert (str(error), error.failure) == ("Do this.", failure)
    assert isinstance(error, errors.P2pkvError)


def test_an_unsupported_cache_says_why() -> None:
    error = UnsupportedCacheError("sliding_window", "layer 3 forgets")
    assert (error.reason, str(error)) == ("sliding_window", "sliding_window: layer 3 forgets")

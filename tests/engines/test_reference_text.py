"""An answer's text in pieces: whole characters, nothing of a stop string, and joined the text that all tokens have at once."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from p2pkv.engines.reference.model import make_tiny_llama
from p2pkv.engines.reference.text import AnswerText

TOKENIZER = make_tiny_llama().tokenizer
PROMPT = TOKENIZER.encode("Where the cache lives").ids


def pieces_of(tokens: Sequence[int], *stop: str, tokenizer: Tokenizer = TOKENIZER, prompt: Sequence[int] = PROMPT) -> list[str]:
    """What each token adds, and what the end adds."""
    text, pieces = AnswerText(tokenizer, prompt, stop), []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stop_reason is not None:
            break
    return [*pieces, text.end()]


def text_before_stop(text: str, stop: Sequence[str]) -> str:
    """The naive way: character by character, until a stop string is complete; the longest of those that are then."""
    for end in range(1, len(text) + 1):
        complete = [each for each in stop if text[:end].endswith(each)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@given(tokens=st.lists(st.integers(0, 959), max_size=60))
def test_the_pieces_of_any_tokens_are_their_text(tokens: list[int]) -> None:
    assert "".join(pieces_of(tokens)) == TOKENIZER.decode(tokens)


@given(text=st.text(st.sampled_from("ab é漢\U0001f980"), max_size=30), stop=st.lists(st.text("ab é漢", min_size=1), max_size=4))
def test_nothing_of_a_stop_string_comes_out(text: str, stop: list[str]) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert "".join(pieces_of(tokens, *stop)) == text_before_stop(text, stop)


def test_a_character_comes_out_with_its_last_byte() -> None:
    tokens = TOKENIZER.encode("é漢", add_special_tokens=False).ids
    assert len(tokens) == 5
    assert pieces_of(tokens) == ["", "é", "", "", "漢", ""]


def test_a_character_that_never_ends_is_the_replacement_character() -> None:
    tokens = TOKENIZER.encode("a漢", add_special_tokens=False).ids[:-1]
    assert pieces_of(tokens) == ["a", "", "", "\ufffd"]


def test_what_a_stop_string_could_begin_with_is_held_until_it_does_not() -> None:
    tokens = TOKENIZER.encode("a\nb\nc", add_special_tokens=False).ids
    assert pieces_of(tokens, "\nc") == ["a", "", "\nb", "", "", ""]
    assert pieces_of(tokens, "\nd") == ["a", "", "\nb", "", "\nc", ""]


def test_an_answer_may_end_like_a_stop_string_begins() -> None:
    tokens = TOKENIZER.encode("a\n", add_special_tokens=False).ids
    assert pieces_of(tokens, "\n\n") == ["a", "", "\n"]


@pytest.mark.parametrize(
    ("stop", "reason"), [(["ab", "b"], "ab"), (["b", "ab"], "ab"), (["bc", "abcd"], "bc"), (["x", "abc"], "abc")]
)
def test_the_stop_string_that_is_complete_first_counts_and_the_longest_of_several(stop: list[str], reason: str) -> None:
    text = AnswerText(TOKENIZER, PROMPT, stop)
    for token in TOKENIZER.encode("abcd", add_special_tokens=False).ids:
        if text.stop_reason is None:
            text.add(token)
    assert text.stop_reason == reason


def test_a_decoder_that_drops_a_texts_leading_space_drops_none_of_the_answers() -> None:
    pieces = {"▁the": 0, "▁cache": 1, "s": 2, "<0xC3>": 3, "<0xA9>": 4}
    llama_2 = Tokenizer(models.WordLevel(pieces, unk_token="s"))
    llama_2.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert llama_2.decode([0, 1]) == "the cache"
    assert pieces_of([1, 2, 3, 4, 0], tokenizer=llama_2, prompt=[0]) == [" cache", "s", "", "é", " the", ""]

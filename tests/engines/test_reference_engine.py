"""The engine without a cache: what it answers, how it ends, what it refuses. With one: tests/live/test_reference_engine.py."""

from dataclasses import replace

import pytest

from p2pkv.engines.reference.engine import FinishReason, ReferenceEngine
from p2pkv.engines.reference.model import make_tiny_llama
from p2pkv.errors import InvalidRequestError

PROMPT = "Explain the significance of KV cache in language models."


@pytest.fixture(scope="module")
def engine() -> ReferenceEngine:
    return ReferenceEngine(make_tiny_llama(), None)


def test_it_answers_with_varied_tokens(engine: ReferenceEngine) -> None:
    done = engine.complete(PROMPT, max_tokens=32)
    assert len(set(done.answer_tokens)) > 20
    assert done.finish_reason is FinishReason.LENGTH
    assert done.cached_count == 0
    assert done.text == engine.detokenize(done.answer_tokens)


def test_text_and_its_token_ids_are_the_same_prompt(engine: ReferenceEngine) -> None:
    tokens = engine.tokenize(PROMPT)
    assert engine.complete(tokens, max_tokens=8) == engine.complete(PROMPT, max_tokens=8)


def test_a_longer_answer_begins_like_a_shorter_one(engine: ReferenceEngine) -> None:
    assert engine.complete(PROMPT, max_tokens=20).answer_tokens[:3] == engine.complete(PROMPT, max_tokens=3).answer_tokens


def test_an_end_token_ends_the_answer() -> None:
    model = make_tiny_llama()
    fourth = ReferenceEngine(model, None).complete(PROMPT, max_tokens=4).answer_tokens[3]
    ending = ReferenceEngine(replace(model, end_tokens=frozenset({fourth})), None)
    done = ending.complete(PROMPT, max_tokens=20)
    assert len(done.answer_tokens) == 4
    assert done.finish_reason is FinishReason.STOP


def test_the_longest_prompt_that_fits_is_answered(engine: ReferenceEngine) -> None:
    assert len(engine.complete([5] * 4095, max_tokens=1).answer_tokens) == 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "sentence"),
    [
        ([], 1, "the prompt is empty"),
        ([5] * 4096, 1, "maximum context length is 4096 tokens; the prompt has 4096 and 1"),
        ([5], 4096, "maximum context length"),
        ([5, 960], 1, "token id 960 is none of this model's, which are 0 to 959"),
        ([-1], 1, "token id -1"),
    ],
)
def test_what_it_cannot_answer_is_refused(engine: ReferenceEngine, prompt: list[int], max_tokens: int, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        engine.complete(prompt, max_tokens=max_tokens)


def test_tokens_that_the_model_has_not_are_no_text(engine: ReferenceEngine) -> None:
    with pytest.raises(InvalidRequestError, match="token id 960"):
        engine.detokenize([960])


def test_a_checkpoint_that_raises_ends_the_work(engine: ReferenceEngine) -> None:
    passes = iter(range(5))

    def checkpoint() -> None:
        next(passes)

    with pytest.raises(StopIteration):
        engine.complete([5] * 600, max_tokens=100, checkpoint=checkpoint)

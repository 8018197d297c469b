"""vLLM itself, without any connector: what the other tests stand on."""

from collections.abc import Callable
from typing import Any

from tests.vllm.engines import MODEL, Server

PROMPT = "The quick brown fox jumps over the lazy dog, and then"


def test_vllm_answers_in_this_process(llm: Callable[..., Any]) -> None:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    (first,) = llm().generate(PROMPT, greedy)
    (again,) = llm().generate(PROMPT, greedy)
    tokens = list(first.outputs[0].token_ids)
    assert tokens == list(again.outputs[0].token_ids)
    assert len(set(tokens)) > 8  # a model that says one word again and again would prove nothing


def test_vllm_serves_and_ends(serve: Callable[..., Server]) -> None:
    server = serve()
    tokens = server.post("/tokenize", {"model": MODEL, "prompt": PROMPT})["tokens"]
    by_text, by_tokens = server.complete(PROMPT, max_tokens=24), server.complete(tokens, max_tokens=24)
    assert by_text["choices"][0]["token_ids"] == by_tokens["choices"][0]["token_ids"]
    assert sum(server.prompt_tokens().values()) == 2 * len(tokens)

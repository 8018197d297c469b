"""Answers as server-sent events, and answers that a stop string ends. On connections: tests/live/test_reference_front.py."""

import json
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import replace
from typing import Any

import httpx2
import pytest
import trio

from p2pkv.engines.reference.answering import UNREAD_LIMIT, CompletionResponse
from p2pkv.engines.reference.engine import Completion, FinishReason, Piece, ReferenceEngine
from p2pkv.engines.reference.front import EngineFront, build_app
from p2pkv.engines.reference.guard import DoorGuard
from p2pkv.engines.reference.model import ReferenceModel, make_tiny_llama
from p2pkv.engines.reference.openai import CompletionRequest

PROMPT = "Explain the significance of KV cache in language models."
MODEL = "p2pkv/tiny-llama"


@pytest.fixture(scope="module")
def tiny_llama() -> ReferenceModel:
    return make_tiny_llama()


@pytest.fixture
async def client(tiny_llama: ReferenceModel) -> AsyncIterator[httpx2.AsyncClient]:
    front = EngineFront(ReferenceEngine(tiny_llama, None), [])
    transport = httpx2.ASGITransport(app=DoorGuard(build_app(front), {8000}))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        yield client


async def complete(client: httpx2.AsyncClient, **fields: object) -> dict[str, Any]:
    reply = await client.post("/v1/completions", json={"model": MODEL, "prompt": PROMPT, **fields})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def stream(client: httpx2.AsyncClient, **fields: object) -> list[dict[str, Any]]:
    reply = await client.post("/v1/completions", json={"model": MODEL, "prompt": PROMPT, "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = reply.content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def test_the_chunks_joined_are_the_answer(client: httpx2.AsyncClient) -> None:
    chunks = await stream(client, max_tokens=60)
    assert len(chunks) > 30
    assert text_of(chunks) == (await complete(client, max_tokens=60))["choices"][0]["text"]


async def test_every_chunk_is_openais_and_the_last_says_why(client: httpx2.AsyncClient) -> None:
    *chunks, last = await stream(client, max_tokens=10)
    assert {chunk["id"] for chunk in [*chunks, last]} == {last["id"]}
    assert (last["object"], last["model"]) == ("text_completion", MODEL)
    assert last["choices"] == [
        {
            "index": 0,
            "text": "",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_token_ids": None,
        }
    ]
    assert all(chunk["choices"][0]["text"] and chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert all("usage" not in chunk for chunk in [*chunks, last])


async def test_the_usage_comes_last_when_asked_for(client: httpx2.AsyncClient) -> None:
    *chunks, last = await stream(client, max_tokens=10, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == (await complete(client, max_tokens=10))["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_token_ids_come_with_their_text_and_the_prompts_once(client: httpx2.AsyncClient) -> None:
    chunks = await stream(client, max_tokens=60, return_token_ids=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    whole = (await complete(client, max_tokens=60, return_token_ids=True))["choices"][0]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    assert [choice["prompt_token_ids"] for choice in choices] == [whole["prompt_token_ids"], *[None] * (len(choices) - 1)]


async def test_a_stop_string_ends_the_answer_before_it_also_across_tokens(client: httpx2.AsyncClient) -> None:
    whole = await complete(client, max_tokens=60)
    text = whole["choices"][0]["text"]
    for begin in range(10, 40, 7):
        stop = text[begin : begin + 9]
        stopped = await complete(client, max_tokens=60, stop=stop)
        assert stopped["choices"][0]["text"] == text[: text.index(stop)]
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert stopped["choices"][0]["stop_reason"] == stop
        assert stopped["usage"]["completion_tokens"] < 60
        chunks = await stream(client, max_tokens=60, stop=[stop])
        assert text_of(chunks) == text[: text.index(stop)]
        last = chunks[-1]["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)


async def test_a_stop_string_that_does_not_come_changes_nothing(client: httpx2.AsyncClient) -> None:
    plain, stopped = await complete(client), await complete(client, stop=["\x00never", "cannot come"])
    assert stopped["choices"] == plain["choices"]
    assert (await complete(client, stop=None))["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"stop": [""]}, "stop.0: String should have at least 1 character"),
        ({"stop": "x" * 257}, "at most 256 characters"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop: Value error, must be one text or a list of at most 4 texts"),
        ({"stop": 5}, "one text or a list"),
        ({"stop": [5]}, "stop.0: Input should be a valid string"),
        ({"stream": True, "prompt": []}, "the prompt is empty"),
        ({"stream": True, "prompt": [0, 960]}, "token id 960"),
        ({"stream_options": {"include_usage": True}}, "only a stream takes them"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ],
)
async def test_what_cannot_be_streamed_or_stopped_is_refused_before_anything_is_sent(
    client: httpx2.AsyncClient, fields: dict[str, object], sentence: str
) -> None:
    reply = await client.post("/v1/completions", json={"model": MODEL, "prompt": PROMPT, **fields})
    assert reply.status_code == 400
    assert sentence in reply.json()["error"]["message"]


async def test_a_reader_that_takes_nothing_is_given_up_without_an_end() -> None:
    sent: list[MutableMapping[str, Any]] = []
    pieces = 0

    async def compute(emit: Callable[[Piece], None]) -> Completion:
        def work() -> Completion:
            nonlocal pieces
            while True:
                emit(Piece("a", (5,)))
                pieces += 1

        return await trio.to_thread.run_sync(work)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await trio.sleep_forever()

    response = CompletionResponse(CompletionRequest(model=MODEL, prompt=PROMPT, stream=True), [5], compute)
    with trio.fail_after(5):
        await response({"type": "http"}, trio.sleep_forever, send)
    assert UNREAD_LIMIT <= pieces <= UNREAD_LIMIT + 1
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


async def test_an_end_token_has_no_text_and_belongs_to_the_last_piece(tiny_llama: ReferenceModel) -> None:
    *_, fourth = ReferenceEngine(tiny_llama, None).complete(PROMPT, max_tokens=4).answer_tokens
    pieces: list[Piece] = []
    ending = ReferenceEngine(replace(tiny_llama, end_tokens=frozenset({fourth})), None)
    done = ending.complete(PROMPT, max_tokens=20, emit=pieces.append)
    assert done.finish_reason is FinishReason.STOP
    assert "".join(piece.text for piece in pieces) == done.text
    assert tuple(token for piece in pieces for token in piece.tokens) == done.answer_tokens

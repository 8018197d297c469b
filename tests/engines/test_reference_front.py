"""The engine's HTTP calls, in vLLM's words; what isn't offered is refused in a sentence."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
import trio

from p2pkv.engines.reference.engine import ReferenceEngine
from p2pkv.engines.reference.front import WAITING_LIMIT, EngineFront, build_app
from p2pkv.engines.reference.guard import MAX_BODY_NBYTES, DoorGuard
from p2pkv.engines.reference.model import ReferenceModel, make_tiny_llama

PROMPT = "Explain the significance of KV cache in language models."
ALIAS = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(scope="module")
def tiny_llama() -> ReferenceModel:
    return make_tiny_llama()


@pytest.fixture
async def client(tiny_llama: ReferenceModel) -> AsyncIterator[httpx2.AsyncClient]:
    front = EngineFront(ReferenceEngine(tiny_llama, None, "this test has none"), [ALIAS])
    transport = httpx2.ASGITransport(app=DoorGuard(build_app(front), {8000}))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        yield client


async def complete(client: httpx2.AsyncClient, **fields: object) -> httpx2.Response:
    return await client.post("/v1/completions", json={"model": ALIAS, "prompt": PROMPT, **fields})


def error_of(reply: httpx2.Response) -> dict[str, Any]:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == reply.status_code
    return dict(error)


async def test_a_completion_as_vllm_gives_it(client: httpx2.AsyncClient) -> None:
    reply = await complete(client, max_tokens=10)
    assert reply.status_code == 200
    body = reply.json()
    assert body["object"] == "text_completion"
    assert body["model"] == ALIAS
    (choice,) = body["choices"]
    assert choice["text"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert choice["index"] == 0
    assert choice["token_ids"] is None
    assert body["usage"] == {
        "prompt_tokens": 12,
        "completion_tokens": 10,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_sixteen_tokens_are_written_unless_said_otherwise(client: httpx2.AsyncClient) -> None:
    assert (await complete(client)).json()["usage"]["completion_tokens"] == 16


async def test_token_ids_are_returned_when_asked_for(client: httpx2.AsyncClient) -> None:
    tokens = (await client.post("/tokenize", json={"prompt": PROMPT})).json()["tokens"]
    (choice,) = (await complete(client, prompt=tokens, return_token_ids=True)).json()["choices"]
    assert choice["prompt_token_ids"] == tokens
    text = (await client.post("/detokenize", json={"model": ALIAS, "tokens": choice["token_ids"]})).json()
    assert text == {"prompt": choice["text"]}


async def test_tokenize_has_vllms_fields(client: httpx2.AsyncClient) -> None:
    plain = (await client.post("/tokenize", json={"model": ALIAS, "prompt": PROMPT})).json()
    assert plain["count"] == len(plain["tokens"]) == 12
    assert plain["tokens"][0] == 0
    assert plain["max_model_len"] == 4096
    assert plain["token_strs"] is None
    wishes = {"prompt": PROMPT, "add_special_tokens": False, "return_token_strs": True}
    bare = (await client.post("/tokenize", json=wishes)).json()
    assert bare["tokens"] == plain["tokens"][1:]
    assert len(bare["token_strs"]) == 11


async def test_all_names_of_the_model_are_listed(client: httpx2.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert [card["id"] for card in body["data"]] == [ALIAS, "p2pkv/tiny-llama"]
    assert (await complete(client, model="p2pkv/tiny-llama")).status_code == 200


async def test_health_says_why_there_is_no_cache(client: httpx2.AsyncClient) -> None:
    reply = await client.get("/health")
    assert reply.status_code == 200
    assert reply.json() == {"cache_problem": "this test has none"}


async def test_an_unknown_model_is_not_found(client: httpx2.AsyncClient) -> None:
    error = error_of(await complete(client, model="gpt-7"))
    assert error["code"] == 404
    assert error["type"] == "NotFoundError"
    assert "`gpt-7` does not exist" in error["message"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": [0, 960]}, "token id 960"),
        ({"prompt": [0] * 5000}, "maximum context length is 4096 tokens"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": ["a", "b"]}, "send several prompts as several requests"),
        ({"prompt": [True]}, "one list of token ids"),
        ({"prompt": None}, "one text or one list"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 4090}, "maximum context length"),
        ({"temperature": 0.7}, "greedily"),
        ({"n": 2}, "one answer a request"),
        ({"top_p": 0.5}, "top_p"),
        ({"cache_salt": "s" * 1025}, "cache_salt"),
    ],
)
async def test_what_is_not_offered_is_refused_in_a_sentence(
    client: httpx2.AsyncClient, fields: dict[str, object], sentence: str
) -> None:
    error = error_of(await complete(client, **fields))
    assert error["code"] == 400
    assert error["type"] == "BadRequestError"
    assert sentence in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"5", b"\xff"])
async def test_a_body_that_is_no_json_object_is_refused(client: httpx2.AsyncClient, body: bytes) -> None:
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    assert error_of(await client.post("/v1/completions", content=body, headers=headers))["code"] == 400


async def test_json_must_say_that_it_is_json(client: httpx2.AsyncClient) -> None:
    reply = await client.post("/tokenize", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert "application/json" in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"host": "evil.example:8000"}, 421),
        ({"content-length": str(MAX_BODY_NBYTES + 1)}, 413),
        ({"content-length": "x"}, 411),
    ],
)
async def test_browsers_and_huge_bodies_are_turned_away(
    client: httpx2.AsyncClient, headers: dict[str, str], status: int
) -> None:
    assert error_of(await client.post("/tokenize", json={"prompt": "a"}, headers=headers))["code"] == status


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000"])
async def test_this_machine_s_own_names_are_welcome(client: httpx2.AsyncClient, host: str) -> None:
    assert (await client.get("/health", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/tokenize", 405)])
async def test_the_frameworks_own_refusals_look_the_same(
    client: httpx2.AsyncClient, method: str, path: str, status: int
) -> None:
    assert error_of(await client.request(method, path))["code"] == status


async def test_a_bug_is_an_error_of_the_same_shape(tiny_llama: ReferenceModel) -> None:
    broken = replace(tiny_llama, end_tokens=None)  # type: ignore[arg-type]  # that is the bug
    front = EngineFront(ReferenceEngine(broken, None), [ALIAS])
    transport = httpx2.ASGITransport(app=build_app(front), raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        error = error_of(await complete(client))
    assert error["type"] == "InternalServerError"


async def test_more_waiting_requests_than_the_limit_are_refused(client: httpx2.AsyncClient) -> None:
    codes: list[int] = []

    async def ask() -> None:
        codes.append((await complete(client, max_tokens=1)).status_code)

    async with trio.open_nursery() as nursery:
        for _ in range(WAITING_LIMIT + 9):
            nursery.start_soon(ask)
    assert codes.count(200) >= WAITING_LIMIT + 1
    assert set(codes) == {200, 503}


async def test_a_cancelled_completion_ends_soon(client: httpx2.AsyncClient) -> None:
    with trio.move_on_after(0.2) as scope:
        await complete(client, max_tokens=4000)
    assert scope.cancelled_caught
    with trio.fail_after(1.0):
        assert (await complete(client, max_tokens=1)).status_code == 200

"""How soon a second engine answers a long prompt that has been moved to it, beside computing one."""

import time
from collections.abc import Sequence

import httpx2

from sims.bench.handoff import move, wait_for_pair
from sims.bench.report import Row
from sims.bench.vllm.asking import ask, random_tokens
from sims.bench.vllm.engines import CONNECTED, Engine, Fleet

PROMPT_TOKENS = 1500
ANSWER_TOKENS = 16
ROUNDS = 7
STORE_S = 10.0


def measure(fleet: Fleet) -> Sequence[Row]:
    """A prompt on the first engine, its move, the same prompt on the second, and there another one that must be computed."""
    first, second = fleet.use(CONNECTED)
    nodes = [fleet.node(seat.instance) for seat in CONNECTED if seat.instance is not None]
    computed, loaded, moves = [], [], []
    late_count = 0
    ask(second, random_tokens(PROMPT_TOKENS, "warm"), ANSWER_TOKENS)
    with httpx2.Client(base_url=nodes[0].http, trust_env=False, timeout=30) as client:
        wait_for_pair(client)
        for round_index in range(ROUNDS):
            prompt = random_tokens(PROMPT_TOKENS, f"first:{round_index}")
            answer = ask(first, prompt, ANSWER_TOKENS)
            _wait_until_held(client, nodes[0].instance, prompt)
            moves.append(move(client, nodes[0].instance, nodes[1].instance, prompt) * 1000)
            before = _external_tokens(second)
            again = ask(second, prompt, ANSWER_TOKENS)
            assert again.tokens == answer.tokens, "the moved prompt got another answer"
            if _external_tokens(second) - before < PROMPT_TOKENS:  # the lookup missed its deadline, on a busy machine
                late_count += 1
                continue
            other = ask(second, random_tokens(PROMPT_TOKENS, f"other:{round_index}"), ANSWER_TOKENS)
            loaded.append(again.first_token_s * 1000)
            computed.append(other.first_token_s * 1000)
    if not loaded:
        raise SystemExit("no moved prompt was loaded: every lookup was late, the machine is too busy to measure")
    what = f"time to first token, {PROMPT_TOKENS} tokens"
    return (
        Row(f"{what}, computed", "ms", tuple(computed)),
        Row(f"{what}, on the second engine after a move", "ms", tuple(loaded)),
        Row("computed / after a move", "", tuple(slow / quick for slow, quick in zip(computed, loaded, strict=True))),
        Row("the move itself, request to done", "ms", tuple(moves)),
        Row(f"moved prompts that were computed, of {ROUNDS}: the lookup was late", "", (late_count,)),
    )


def _external_tokens(engine: Engine) -> float:
    return engine.prompt_tokens()["external_kv_transfer"]


def _wait_until_held(client: httpx2.Client, instance: str, prompt: Sequence[int]) -> None:
    """Wait until the node holds the prompt: engines store beside their steps."""
    deadline = time.monotonic() + STORE_S
    while client.post("/lookup", json={"tokens": prompt}).json()["layout_info"].get(instance, ["", 0])[1] < len(prompt):
        assert time.monotonic() < deadline, f"{instance} wasn't given the prompt"
        time.sleep(0.05)

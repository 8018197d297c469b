"""How soon a second engine answers a long prompt that was moved to it, or is fetched from the first, beside computing one."""

import time
from collections.abc import Sequence
from statistics import median

import httpx2

from sims.bench.handoff import move, wait_for_pair
from sims.bench.report import Row
from sims.bench.vllm.asking import ask, random_tokens
from sims.bench.vllm.engines import FETCHING, Engine, Fleet

PROMPT_TOKENS = 1500
ANSWER_TOKENS = 16
ROUNDS = 7
STORE_S = 10.0


def measure(fleet: Fleet) -> Sequence[Row]:
    """In each round a prompt that is moved before it is asked again, one that isn't, and one that must be computed."""
    first, second = fleet.use(FETCHING)
    nodes = [fleet.node(seat.instance) for seat in FETCHING if seat.instance is not None]
    computed, loaded, fetched, moves = [], list[float](), list[float](), []
    ask(second, random_tokens(PROMPT_TOKENS, "warm"), ANSWER_TOKENS)
    with httpx2.Client(base_url=nodes[1].http, trust_env=False, timeout=30) as client:
        wait_for_pair(client)
        for round_index in range(ROUNDS):
            for is_moved, times_ms in ((True, loaded), (False, fetched)):
                prompt = random_tokens(PROMPT_TOKENS, f"{is_moved}:{round_index}")
                answer = ask(first, prompt, ANSWER_TOKENS)
                _wait_until_held(client, nodes[0].instance, prompt)
                if is_moved:
                    moves.append(move(client, nodes[0].instance, nodes[1].instance, prompt) * 1000)
                before = _external_tokens(second)
                again = ask(second, prompt, ANSWER_TOKENS)
                assert again.tokens == answer.tokens, "what was loaded led to another answer"
                if _external_tokens(second) - before >= PROMPT_TOKENS:
                    times_ms.append(again.first_token_s * 1000)
            other = ask(second, random_tokens(PROMPT_TOKENS, f"other:{round_index}"), ANSWER_TOKENS)
            computed.append(other.first_token_s * 1000)
    if not loaded or not fetched:
        raise SystemExit("every lookup was late: the machine is too busy to measure")
    what = f"time to first token, {PROMPT_TOKENS} tokens"
    return (
        Row(f"{what}, computed", "ms", tuple(computed)),
        Row(f"{what}, on the second engine after a move", "ms", tuple(loaded)),
        Row(f"{what}, on the second engine, fetched from the first", "ms", tuple(fetched)),
        Row("computed / after a move", "", (median(computed) / median(loaded),)),
        Row("computed / fetched", "", (median(computed) / median(fetched),)),
        Row("the move itself, request to done", "ms", tuple(moves)),
        Row(f"moved prompts that were computed, of {ROUNDS}: the lookup was late", "", (ROUNDS - len(loaded),)),
        Row(f"prompts that weren't fetched in time, of {ROUNDS}", "", (ROUNDS - len(fetched),)),
    )


def _external_tokens(engine: Engine) -> float:
    return engine.prompt_tokens()["external_kv_transfer"]


def _wait_until_held(client: httpx2.Client, instance: str, prompt: Sequence[int]) -> None:
    """Wait until it is known that the instance holds the prompt: engines store beside their steps."""
    deadline = time.monotonic() + STORE_S
    while client.post("/lookup", json={"tokens": prompt}).json()["layout_info"].get(instance, ["", 0])[1] < len(prompt):
        assert time.monotonic() < deadline, f"{instance} wasn't given the prompt, or the other doesn't hear of it"
        time.sleep(0.05)

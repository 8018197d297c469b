"""`peer_fetch` under real vLLM: what only a peer's node holds is loaded, without a move, or computed if it comes too late."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.live.command_line import AT
from tests.live.doors import SLOW, NodeProcess, open_cluster, states
from tests.vllm.connected import PATIENT, Engine, prompt_of, wait_until
from tests.vllm.engines import in_process

AT_A = prompt_of(300, seed=1)
AT_A_AND_C = {"a": prompt_of(301, seed=2), "c": prompt_of(302, seed=2)}
"""By the instance that a router names."""
AT_SLOW = prompt_of(1500, seed=3)


@dataclass
class Scene:
    """An engine whose node fetches, its peers, and what the first one's engine has answered."""

    engine: Engine
    nodes: dict[str, NodeProcess]
    answers: dict[int, list[int]]

    def held(self, name: str, tokens: list[int]) -> int:
        """How many of the tokens a node holds; nothing is fetched for this."""
        found = self.nodes[name].post("/lookup", tokens=tokens).json()["layout_info"]
        return int(found.get(name, [AT, 0])[1])

    def copies(self, tokens: list[int]) -> list[tuple[str, bool]]:
        """Of each event that brought a prompt of this length to the fetching node: from where, and whether it was a copy."""
        events = self.nodes["b"].get("/events").json()["events"]
        came = [each for each in events if each["new_position"][0] == "b" and each["num_tokens"] == len(tokens)]
        return [(each["old_position"][0], each["copy"]) for each in came]


@contextmanager
def engine_of(node: NodeProcess, model: Path) -> Iterator[Engine]:
    """An engine that finds nothing in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("P2PKV_CONFIG_FILE", str(node.config))
        with in_process(model, kv_transfer=PATIENT, enable_prefix_caching=False) as llm:
            engine = Engine(llm, model)
            engine.wait_until_held([])
            yield engine


def transfer(node: NodeProcess, target: str, **fields: Any) -> None:
    reply = node.post("/move", old_position=[node.name, AT], new_position=[target, AT], wait_s=20, **fields)
    assert reply.json()["state"] == "done", reply.text


@pytest.fixture(scope="module")
def scene(tiny_model: Path) -> Iterator[Scene]:
    with open_cluster() as cluster:
        nodes = {node.name: node for node in cluster.start(a=(), b=("peer_fetch: true",), c=(), slow=SLOW)}
        for node in nodes.values():
            wait_until(lambda node=node: list(states(node).values()) == ["alive"] * len(nodes))  # type: ignore[misc]
        answers = {}
        with engine_of(nodes["a"], tiny_model) as first:
            for prompt in (AT_SLOW, AT_A, *AT_A_AND_C.values()):
                answer, _ = first.answer(prompt)
                first.wait_until_held([*prompt, *answer[:-1]])
                answers[len(prompt)] = answer
                if prompt is AT_SLOW:
                    transfer(nodes["a"], "slow", all=True)
        for prompt in AT_A_AND_C.values():
            transfer(nodes["a"], "c", tokens=prompt, copy=True)
        with engine_of(nodes["b"], tiny_model) as engine:
            yield Scene(engine, nodes, answers)


def test_what_only_a_peer_holds_is_loaded_without_a_move_and_stays_there_too(scene: Scene) -> None:
    assert scene.engine.answer(AT_A) == (scene.answers[len(AT_A)], len(AT_A))
    assert scene.engine.metric("loaded_tokens") == len(AT_A)
    assert scene.engine.prompt_tokens("external_kv_transfer") == len(AT_A)
    assert scene.copies(AT_A) == [("a", True)]
    assert (scene.held("a", AT_A), scene.held("b", AT_A)) == (len(AT_A), len(AT_A))


@pytest.mark.parametrize("source", ["a", "c"])
def test_the_instance_that_a_router_names_is_the_one_that_it_comes_from(scene: Scene, source: str) -> None:
    prompt = AT_A_AND_C[source]
    [output] = scene.engine.ask([prompt], instance=source, generation=1, num_tokens=len(prompt))
    assert (list(output.outputs[0].token_ids), output.num_cached_tokens) == (scene.answers[len(prompt)], len(prompt))
    assert scene.copies(prompt) == [(source, True)]


def test_what_comes_too_late_is_computed_and_found_the_next_time(scene: Scene) -> None:
    [output] = scene.engine.ask([AT_SLOW], skip_save=True)
    assert (list(output.outputs[0].token_ids), output.num_cached_tokens) == (scene.answers[len(AT_SLOW)], 0)
    wait_until(lambda: scene.held("b", AT_SLOW) == len(AT_SLOW))  # six mebibytes, one a second
    assert scene.engine.answer(AT_SLOW) == (scene.answers[len(AT_SLOW)], len(AT_SLOW))
    assert scene.held("slow", AT_SLOW) == len(AT_SLOW)

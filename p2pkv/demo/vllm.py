"""The walk-through with two real `vllm serve`, on the CPU; then one engine is killed, and the other is started again.

The commands are the seed's, with the connector's name swapped, and what two engines on one small machine need besides. No node
is started here: each engine starts its own, which outlives it.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from p2pkv.core.records import MemberState
from p2pkv.demo.programs import Program, Programs, pids_of
from p2pkv.demo.setting import INSTANCES
from p2pkv.demo.stage import Stage
from p2pkv.demo.walkthrough import JOIN_S, MODEL, Answer, Prompt, Walkthrough
from p2pkv.errors import P2pkvError

VLLM = Path(sys.executable).with_name("vllm")
READY_S = 300.0
"""It takes 45 s on two idle cores, 70 s beside another one."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
"""Nothing leaves this host, and an engine's own KV cache is 1 GiB."""
SEED_OPTIONS = ("--max-model-len", "4096", "--gpu-memory-utilization", "0.8")
CONNECTOR = '{"kv_connector":"P2PKVConnector", "kv_role":"kv_both"}'
MORE_OPTIONS = (
    *("--host", "127.0.0.1", "--dtype", "float32", "--block-size", "32", "--enforce-eager"),
    "--no-enable-prefix-caching",  # so that all that isn't computed comes from p2pkv
)
SOURCES = "vllm:prompt_tokens_by_source_total"


class VllmWalkthrough(Walkthrough):
    """Engines are vLLM's, with `P2PKVConnector`; each starts its node.

    Raises:
        P2pkvError: vLLM isn't installed beside this Python.
    """

    def __init__(self, stage: Stage, folder: Path) -> None:
        if not VLLM.exists():
            raise P2pkvError(f"{VLLM} doesn't exist; ./dev demo --vllm makes an environment that has vLLM")
        super().__init__(stage, folder)
        self._other_prompt = Prompt(
            "the second prompt", "What does an engine do with a KV cache that another one has computed?"
        )
        self._environment = {**ENVIRONMENT, "TMPDIR": str(folder)}
        self._counts: list[dict[str, int]] = [{}, {}]

    async def _play(self, programs: Programs, configs: tuple[Path, Path]) -> None:
        self._save_model()
        engines = self._start(programs, configs)
        self._compute(self._prompt)
        self._move_over_http(self._prompt)
        self._compute_for_another_tenant(self._prompt)
        self._compute(self._other_prompt)
        self._kill(programs, engines[0])
        self._move_over_http(self._other_prompt)
        self._end(programs, self._restart(programs, engines[1], configs[1]))

    def _ask(self, index: int, fields: Mapping[str, object]) -> Answer:
        completion = self._stage.post(f"{self._engines[index]}/v1/completions", {**fields, "temperature": 0})
        counts = counts_by_source(self._stage.grep(f"{self._engines[index]}/metrics", SOURCES))
        came = {source: count - self._counts[index].get(source, 0) for source, count in counts.items()}
        self._counts[index] = counts
        loaded = came.pop("external_kv_transfer", 0)
        return Answer(completion["choices"][0]["text"], sum(came.values()), loaded)

    # --- programs ---

    def _save_model(self) -> None:
        from p2pkv.engines.reference.model import save_tiny_llama

        self._stage.say("A small Llama with random weights, in a folder that has the name of a large one")
        save_tiny_llama(self._folder / MODEL)
        self._stage.type(f"cd {self._folder}")
        self._stage.type(f"ls {MODEL}")
        self._stage.show("  ".join(sorted(file.name for file in (self._folder / MODEL).iterdir())))

    def _start(self, programs: Programs, configs: tuple[Path, Path]) -> list[Program]:
        self._stage.say("A vLLM engine for each, which starts the node of its instance; the nodes need no controller")
        self._stage.type(f"export {_assignments(self._environment)}")
        started_at = time.monotonic()
        engines = [self._serve(programs, index, config) for index, config in enumerate(configs)]
        for index, engine in enumerate(engines):
            self._wait(programs, index, engine, started_at)
        self._check_nodes("each engine has started its node")
        return engines

    def _serve(self, programs: Programs, index: int, config: Path) -> Program:
        variables = variables_of(index, config)
        lines = arguments_of(self._ports.engines[index])
        arguments = " \\\n  ".join(map(shlex.join, lines))
        self._stage.type(f"{_assignments(variables)} vllm {arguments} &")
        return programs.start_server(f"engine{index + 1}", [str(VLLM), *chain(*lines)], {**self._environment, **variables})

    def _wait(self, programs: Programs, index: int, engine: Program, started_at: float) -> None:
        programs.wait_until_healthy(engine, f"{self._engines[index]}/health", READY_S)
        self._stage.show(f"engine {index + 1} is ready after {time.monotonic() - started_at:.0f} s")

    def _kill(self, programs: Programs, engine: Program) -> None:
        self._stage.say("Engine 1 is killed; its node lives on, with all that it holds")
        pids = pids_of(engine)
        self._stage.type(f"kill -9 {' '.join(map(str, pids))}")
        programs.kill(engine, pids)
        self._check_nodes("the node outlives its engine")

    def _restart(self, programs: Programs, engine: Program, config: Path) -> Program:
        self._stage.say("Engine 2 ends and starts again; its instance still holds both prompts")
        self._stage.type(f"kill {engine.process.pid}")
        programs.end(engine)
        self._counts[1] = {}
        started_at = time.monotonic()
        again = self._serve(programs, 1, config)
        self._wait(programs, 1, again, started_at)
        for prompt in (self._prompt, self._other_prompt):
            self._check_loaded(1, prompt, " after its restart")
        return again

    def _end(self, programs: Programs, engine: Program) -> None:
        self._stage.say("The end")
        self._stage.type(f"kill {engine.process.pid}")
        programs.end(engine)
        has_ended = programs.end_nodes_of_engines()
        self._stage.check("both nodes end when they are told to", has_ended, "all have" if has_ended else "not all have")

    def _check_nodes(self, what: str) -> None:
        # An engine doesn't wait for its node: it may be ready a little before.
        expected = dict.fromkeys(INSTANCES, MemberState.ALIVE)
        url = f"{self._nodes}/members"
        states = _states(self._stage.get_until(url, lambda reply: _states(reply) == expected, within_s=JOIN_S))
        seen = ", ".join(f"{instance}: {state}" for instance, state in sorted(states.items()))
        self._stage.check(what, states == expected, seen)


def variables_of(index: int, config: Path) -> dict[str, str]:
    """What engine `index` has in its environment: the seed's variables, and a core of its own if there is one for each.

    By itself vLLM would give both the same one.
    """
    cores = sorted(os.sched_getaffinity(0))
    own = {"VLLM_CPU_OMP_THREADS_BIND": str(cores[index])} if len(cores) >= len(INSTANCES) else {}
    return {**own, "CUDA_VISIBLE_DEVICES": str(index), "LMCACHE_CONFIG_FILE": config.name}


def arguments_of(port: int) -> tuple[tuple[str, ...], ...]:
    """The arguments of `vllm` in three lines; the first two are the seed's."""
    return (
        ("serve", MODEL, *SEED_OPTIONS),
        ("--port", str(port), "--kv-transfer-config", CONNECTOR),
        MORE_OPTIONS,
    )


def counts_by_source(lines: Iterable[str]) -> dict[str, int]:
    """Tokens by where they came from, out of such lines of Prometheus' text format as `{...,source="local_compute"} 12.0`."""
    counts = {}
    for line in lines:
        labels, count = line.rsplit(" ", 1)
        counts[labels.split('source="')[1].split('"')[0]] = int(float(count))
    return counts


def _states(members: Mapping[str, Any]) -> dict[str, str]:
    return {member["instance"]: member["state"] for member in members.get("members", ())}


def _assignments(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())

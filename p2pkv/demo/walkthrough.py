"""The walk-through itself: what the seed does, and then the cache back and forth by every other way in."""

import json
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from p2pkv.core.ids import Location
from p2pkv.demo.programs import Programs
from p2pkv.demo.setting import INSTANCES, TCP_INSTANCE, free_ports, tcp_instance_yaml, write_yamls
from p2pkv.demo.stage import Stage
from p2pkv.errors import P2pkvError

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
"""The name in the seed's commands, under which the demo's engines serve their small Llama."""
PROMPT = "Explain the significance of KV cache in language models."
VIEW_S = 2.0
"""After a change, every node's lookup agrees by then."""
JOIN_S = 10.0
"""Nodes of one host meet within a second of a start, on an idle machine."""


async def run_demo(*, as_json: bool = False) -> int:
    """Run the whole walk-through; nothing of it is left running, however it ends.

    Only the websocket is awaited; all else blocks the event loop, which has nothing else to do.

    Args:
        as_json: Print the checks as one JSON object instead of the story.

    Returns:
        The exit code: 0 when all that was checked is true, else 1.
    """
    console = Console(quiet=as_json, highlight=False, soft_wrap=True)
    stage = Stage(console)
    before = signal.signal(signal.SIGTERM, _interrupt)
    problem = None
    try:
        with tempfile.TemporaryDirectory(prefix="p2pkv-demo-") as folder:
            await _Walkthrough(stage, Path(folder)).run()
    except P2pkvError as error:
        problem = str(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    is_good = problem is None and all(check.is_true for check in stage.checks)
    if as_json:
        typer.echo(json.dumps({"ok": is_good, "problem": problem, "checks": [asdict(check) for check in stage.checks]}))
        return 0 if is_good else 1
    console.print()
    console.print(stage.table())
    if problem is not None:
        console.print(f"[red]The demo could not go on:[/red] {escape(problem)}")
    return 0 if is_good else 1


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


class _Walkthrough:
    """One run, in `folder`."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self._stage = stage
        self._folder = folder
        self._ports, self._replaced = free_ports()
        self._engines = [f"http://localhost:{port}" for port in self._ports.engines]
        self._nodes = f"http://localhost:{self._ports.shared}"
        self._completion: dict[str, object] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 10}
        self._tokens: list[int] = []
        self._answer = ""

    async def run(self) -> None:
        """All of it.

        Raises:
            P2pkvError: A program didn't start, or a call wasn't answered.
        """
        for usual, other in self._replaced.items():
            self._stage.show(f"Port {usual} is taken; {other} is used instead.")
        runtime = self._folder / "run"
        runtime.mkdir(mode=0o700)
        self._stage.say("Two instances, one file each")
        self._stage.type(f"export P2PKV_RUNTIME_DIR={runtime}")
        configs = write_yamls(self._folder, self._ports)
        for config in configs:
            self._show_file(config)
        with Programs(self._folder, runtime) as programs:
            self._start(programs, configs)
            self._compute()
            self._move_over_http()
            await self._move_back_over_websocket()
            self._start_tcp_instance(programs)
            self._move_over_tcp()
            codes = programs.end_all()
        nodes = [code for name, code in codes.items() if name.startswith("node")]
        self._stage.check("all nodes left the cluster and ended with 0", set(nodes) == {0}, f"exit codes {nodes}")

    # --- programs ---

    def _start(self, programs: Programs, configs: tuple[Path, Path]) -> None:
        self._stage.say("A node for each")
        nodes = [("node", "--config", str(config)) for config in configs]
        self._run(programs, {f"node{number}": arguments for number, arguments in enumerate(nodes, start=1)})
        self._stage.say("An engine for each: a small Llama with random weights, served under the name of a large one")
        engines = [
            ("engine", "--config", str(config), "--port", str(port), "--served-model-name", MODEL)
            for config, port in zip(configs, self._ports.engines, strict=True)
        ]
        self._run(programs, {f"engine{number}": arguments for number, arguments in enumerate(engines, start=1)})

    def _start_tcp_instance(self, programs: Programs) -> None:
        self._stage.say("A third instance, which passes no memory on: what it gets and sends goes over TCP, as between hosts")
        config = self._folder / "instance3.yaml"
        config.write_text(tcp_instance_yaml(self._ports), encoding="utf-8")
        self._show_file(config)
        self._run(programs, {"node3": ("node", "--config", str(config))})

    def _run(self, programs: Programs, commands: Mapping[str, Sequence[str]]) -> None:
        started = []
        for name, arguments in commands.items():
            self._stage.type(f"p2pkv {' '.join(arguments)} &")
            started.append(programs.start(name, arguments))
        for program in started:
            self._stage.show(programs.ready_line(program))

    def _show_file(self, path: Path) -> None:
        self._stage.type(f"cat {path}")
        self._stage.show(path.read_text(encoding="utf-8").rstrip())

    # --- scenes ---

    def _compute(self) -> None:
        self._stage.say("A completion on engine 1, which computes the prompt's KV cache and keeps it at instance 1")
        computed = self._stage.post(f"{self._engines[0]}/v1/completions", self._completion)
        self._check_cached("engine 1 computes the prompt", computed, 0)
        self._answer = _text(computed)
        self._stage.say("The prompt's token ids")
        self._tokens = self._stage.post(f"{self._engines[0]}/tokenize", {"model": MODEL, "prompt": PROMPT})["tokens"]
        self._stage.say("Who holds it")
        self._check_holder(INSTANCES[0])

    def _move_over_http(self) -> None:
        self._stage.say("Move it from engine 1's CPU to engine 2's CPU")
        moved = self._stage.post(f"{self._nodes}/move", self._order(*INSTANCES))
        count = len(self._tokens)
        self._stage.check(
            "the move takes every token of the prompt", moved["num_tokens"] == count, f"{moved['num_tokens']} of {count}"
        )
        self._stage.say("What the event says")
        self._check_event("moved over HTTP", self._stage.get(f"{self._nodes}/events/{moved['event_id']}"), "handoff")
        self._stage.say("Who holds it now")
        self._check_holder(INSTANCES[1])

        self._stage.say("The same completion on engine 2, which loads the KV cache that engine 1 computed")
        self._check_loaded(1)
        self._stage.say("The same on engine 2 again, for another tenant, who shares no cache: all is computed")
        alone = self._stage.post(f"{self._engines[1]}/v1/completions", {**self._completion, "cache_salt": "another tenant"})
        self._check_cached("another tenant finds nothing cached", alone, 0)
        self._stage.check("the answer without any cache is the same", _text(alone) == self._answer, repr(_text(alone)))

    async def _move_back_over_websocket(self) -> None:
        self._stage.say("Move it back over instance 1's websocket, and watch")
        door = f"ws://localhost:{self._ports.workers[0]}/control"
        event = await self._stage.converse(door, self._order(*reversed(INSTANCES)))
        self._check_event("moved back over the websocket", event, "handoff")
        self._check_holder(INSTANCES[0])
        self._stage.say("Engine 1 has it again")
        self._check_loaded(0)

    def _move_over_tcp(self) -> None:
        self._stage.say("Move it to the third instance, and from there to instance 2")
        for old, new in ((INSTANCES[0], TCP_INSTANCE), (TCP_INSTANCE, INSTANCES[1])):
            # Until the node that answers has met the third instance, it refuses.
            moved = self._stage.post_until(
                f"{self._nodes}/move", self._order(old, new), lambda body: "event_id" in body, within_s=JOIN_S
            )
            event = self._stage.get(f"{self._nodes}/events/{moved['event_id']}")
            self._check_event(f"moved from {old} to {new}", event, "tcp")
        self._check_holder(INSTANCES[1])
        self._stage.say("Engine 2 answers from what has come over TCP")
        self._check_loaded(1)

    def _order(self, old: str, new: str) -> dict[str, object]:
        positions = {"old_position": [old, Location.LOCAL_CPU], "new_position": [new, Location.LOCAL_CPU]}
        return {**positions, "tokens": self._tokens}

    # --- checks ---

    def _check_loaded(self, index: int) -> None:
        """Complete on an engine whose instance holds the prompt."""
        loaded = self._stage.post(f"{self._engines[index]}/v1/completions", self._completion)
        self._check_cached(f"engine {index + 1} loads all but the last token", loaded, len(self._tokens) - 1)
        self._stage.check(f"engine {index + 1} gives the same answer", _text(loaded) == self._answer, repr(_text(loaded)))

    def _check_cached(self, what: str, completion: Mapping[str, Any], expected: int) -> None:
        usage = completion["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self._stage.check(what, cached == expected, f"{cached} of {usage['prompt_tokens']} tokens from the cache")

    def _check_event(self, what: str, event: Mapping[str, Any], lane: str) -> None:
        chunks = event["chunks"]
        is_done = event["state"] == "done" and chunks["found"] == chunks["moved"] > 0 and event["lane"] == lane
        seen = f"{event['state']}, {chunks['moved']} of {chunks['found']} chunks, {event['bytes']} bytes by {event['lane']}"
        self._stage.check(what, is_done, seen)

    def _check_holder(self, instance: str) -> None:
        expected = {instance: [Location.LOCAL_CPU, len(self._tokens)]}
        reply = self._stage.post_until(
            f"{self._nodes}/lookup",
            {"tokens": self._tokens},
            lambda body: body.get("layout_info") == expected,
            within_s=VIEW_S,
        )
        holders = reply["layout_info"]
        seen = ", ".join(f"{name}: {held[1]} tokens" for name, held in holders.items())
        self._stage.check(f"only {instance} holds the prompt", holders == expected, seen)


def _text(completion: Mapping[str, Any]) -> str:
    return str(completion["choices"][0]["text"])

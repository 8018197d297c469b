"""The walk-through itself: each command as a user would type it, what came back, and a table of what was checked."""

import json
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from p2pkv.commands.client import NodeClient, Reply
from p2pkv.core.ids import Location
from p2pkv.demo.programs import Programs
from p2pkv.demo.setting import INSTANCES, Ports, free_ports, write_yamls
from p2pkv.errors import P2pkvError

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
"""The name in the seed's commands, under which the demo's engines serve their small Llama."""
PROMPT = "Explain the significance of KV cache in language models."
CALL_S = 30.0
VIEW_S = 2.0
"""After a change, every node's lookup agrees by then."""
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that should be so, and what was seen."""

    what: str
    is_true: bool
    seen: str


def run_demo(*, as_json: bool = False) -> int:
    """Run the whole walk-through; nothing of it is left running, however it ends.

    Args:
        as_json: Print the checks as one JSON object instead of the story.

    Returns:
        The exit code: 0 when all that was checked is true, else 1.
    """
    console = Console(quiet=as_json, highlight=False, soft_wrap=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    problem = None
    checks: list[Check] = []
    try:
        with tempfile.TemporaryDirectory(prefix="p2pkv-demo-") as folder:
            _Walkthrough(console, Path(folder), checks).run()
    except P2pkvError as error:
        problem = str(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    is_good = problem is None and all(check.is_true for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": is_good, "problem": problem, "checks": [asdict(check) for check in checks]}))
        return 0 if is_good else 1
    console.print()
    console.print(_table(checks))
    if problem is not None:
        console.print(f"[red]The demo could not go on:[/red] {escape(problem)}")
    return 0 if is_good else 1


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


class _Walkthrough:
    """One run, in `folder`; what it checks goes to `checks` as it goes along."""

    def __init__(self, console: Console, folder: Path, checks: list[Check]) -> None:
        self._console = console
        self._folder = folder
        self._checks = checks

    def run(self) -> None:
        """All of it.

        Raises:
            P2pkvError: A program didn't start, or a call wasn't answered.
        """
        ports, replaced = free_ports()
        for usual, other in replaced.items():
            self._console.print(f"Port {usual} is taken; {other} is used instead.")
        runtime = self._folder / "run"
        runtime.mkdir(mode=0o700)
        self._say("Two instances, one file each")
        self._type(f"export P2PKV_RUNTIME_DIR={runtime}")
        configs = write_yamls(self._folder, ports)
        for config in configs:
            self._type(f"cat {config}")
            self._show(config.read_text(encoding="utf-8").rstrip())
        with Programs(self._folder, runtime) as programs:
            self._start(programs, configs, ports)
            self._move_and_use(ports)
            codes = programs.end_all()
        nodes = {name: code for name, code in codes.items() if name.startswith("node")}
        self._check(
            "both nodes left the cluster and ended with 0", set(nodes.values()) == {0}, f"exit codes {sorted(nodes.values())}"
        )

    def _start(self, programs: Programs, configs: tuple[Path, Path], ports: Ports) -> None:
        self._say("A node for each")
        nodes = [("node", "--config", str(config)) for config in configs]
        self._run(programs, nodes)
        self._say("An engine for each: a small Llama with random weights, served under the name of a large one")
        engines = [
            ("engine", "--config", str(config), "--port", str(port), "--served-model-name", MODEL)
            for config, port in zip(configs, ports.engines, strict=True)
        ]
        self._run(programs, engines)

    def _run(self, programs: Programs, commands: Sequence[tuple[str, ...]]) -> None:
        started = []
        for number, arguments in enumerate(commands, start=1):
            self._type(f"p2pkv {' '.join(arguments)} &")
            started.append(programs.start(f"{arguments[0]}{number}", arguments))
        for program in started:
            self._show(programs.ready_line(program))

    def _move_and_use(self, ports: Ports) -> None:
        first, second = (f"http://localhost:{port}" for port in ports.engines)
        nodes = f"http://localhost:{ports.shared}"
        completion: dict[str, object] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 10}

        self._say("A completion on engine 1, which computes the prompt's KV cache and keeps it at instance 1")
        computed = self._post(f"{first}/v1/completions", completion)
        self._check_cached("engine 1 computes the prompt", computed, 0)

        self._say("The prompt's token ids")
        tokenized = self._post(f"{first}/tokenize", {"model": MODEL, "prompt": PROMPT})
        tokens, count = tokenized["tokens"], tokenized["count"]

        self._say("Who holds it")
        self._check_holder("only instance 1 holds the prompt", INSTANCES[0], f"{nodes}/lookup", tokens)

        self._say("Move it from engine 1's CPU to engine 2's CPU")
        old, new = ([instance, Location.LOCAL_CPU] for instance in INSTANCES)
        moved = self._post(f"{nodes}/move", {"old_position": old, "new_position": new, "tokens": tokens})
        self._check(
            "the move takes every token of the prompt", moved["num_tokens"] == count, f"{moved['num_tokens']} of {count}"
        )

        self._say("What the event says")
        event = self._get(f"{nodes}/events/{moved['event_id']}")
        chunks = event["chunks"]
        is_done = event["state"] == "done" and chunks["found"] == chunks["moved"] > 0
        seen = f"{event['state']}, {chunks['moved']} of {chunks['found']} moved, {event['bytes']} bytes by {event['lane']}"
        self._check("the move is done, all chunks moved", is_done, seen)

        self._say("Who holds it now")
        self._check_holder("only instance 2 holds the prompt", INSTANCES[1], f"{nodes}/lookup", tokens)

        self._say("The same completion on engine 2, which loads the KV cache that engine 1 computed")
        loaded = self._post(f"{second}/v1/completions", completion)
        self._check_cached("engine 2 loads all but the last token", loaded, count - 1)
        self._check("engine 2 answers as engine 1 did", _text(loaded) == _text(computed), repr(_text(loaded)))

        self._say("The same on engine 2 again, for another tenant, who shares no cache: all is computed")
        alone = self._post(f"{second}/v1/completions", {**completion, "cache_salt": "another tenant"})
        self._check_cached("another tenant finds nothing cached", alone, 0)
        self._check("the answer without any cache is the same", _text(alone) == _text(loaded), repr(_text(alone)))

    def _check_cached(self, what: str, completion: Mapping[str, Any], expected: int) -> None:
        usage = completion["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self._check(what, cached == expected, f"{cached} of {usage['prompt_tokens']} tokens from the cache")

    def _check_holder(self, what: str, instance: str, url: str, tokens: list[int]) -> None:
        """Ask until the answer is as it should be, or should have been; the last one is shown."""
        expected = {instance: [Location.LOCAL_CPU, len(tokens)]}
        body = {"tokens": tokens}
        deadline = time.monotonic() + VIEW_S
        while (reply := _call("POST", url, body)).body.get("layout_info") != expected and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._type(_curl(url, body))
        holders = self._answered(reply)["layout_info"]
        self._check(what, holders == expected, ", ".join(f"{name}: {held[1]} tokens" for name, held in holders.items()))

    def _post(self, url: str, body: Mapping[str, object]) -> dict[str, Any]:
        self._type(_curl(url, body))
        return self._answered(_call("POST", url, body))

    def _get(self, url: str) -> dict[str, Any]:
        self._type(f"curl {url}")
        return self._answered(_call("GET", url))

    def _answered(self, reply: Reply) -> dict[str, Any]:
        self._show(json.dumps(reply.body))
        if not reply.is_success:
            raise P2pkvError(f"the call was answered with {reply.status}: {json.dumps(reply.body)}")
        return reply.body

    def _check(self, what: str, is_true: bool, seen: str) -> None:  # noqa: FBT001 - it is what the check is about
        self._checks.append(Check(what, is_true, seen))

    def _say(self, title: str) -> None:
        self._console.print(f"\n[bold cyan]{escape(title)}[/]")

    def _type(self, command: str) -> None:
        self._console.print(f"[bold]$ {escape(command)}[/]")

    def _show(self, text: str) -> None:
        self._console.print(escape(text))


def _text(completion: Mapping[str, Any]) -> str:
    return str(completion["choices"][0]["text"])


def _call(method: str, url: str, body: Mapping[str, object] | None = None) -> Reply:
    with httpx2.Client(timeout=CALL_S, trust_env=False) as http:
        return NodeClient(http).call(method, url, body)


def _curl(url: str, body: Mapping[str, object]) -> str:
    fields = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in body.items())
    return f"curl -X POST {url} \\\n  -H \"Content-Type: application/json\" \\\n  -d '{{\n{fields}\n  }}'"


def _table(checks: list[Check]) -> Table:
    table = Table(title="What was checked", title_justify="left", show_edge=False)
    table.add_column("")
    table.add_column("what should be so")
    table.add_column("what was seen")
    for check in checks:
        mark = "[green]yes[/]" if check.is_true else "[red]NO[/]"
        table.add_row(mark, escape(check.what), escape(check.seen))
    return table

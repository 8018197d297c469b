"""`p2pkv bench`: what moves between two instances of the running cluster take.

It is an engine of its own at the source's node, with a model that only it has, so nobody's chunks are touched. Signals only set
a flag: what is under way ends first, within a second as a rule, so that it is known what has to be cleared.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from p2pkv.commands.bench_ends import POLL_S, VIEW_S, End, alone, check_room, find_end, local_source
from p2pkv.commands.bench_report import Report, Row
from p2pkv.commands.client import NodeClient, open_client
from p2pkv.commands.exit_codes import ExitCode
from p2pkv.commands.top_view import UNFINISHED
from p2pkv.core.ids import Location
from p2pkv.errors import ConfigError, P2pkvError
from p2pkv.http_paths import event_path

if TYPE_CHECKING:
    from p2pkv.commands.bench_chunks import OwnChunks, Prompt

WAIT_S = 1.0
"""How long an answer to `/move` waits for the end, and so how long Ctrl-C does; a longer move is asked after."""
ASK_S = 0.005
"""Between two questions whether it has ended."""
SMALL_PER_ROUND = 10
"""Small moves, there and back, and lookups of either prompt, for one large move there and back."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What was asked for.

    Attributes:
        chunk_count: Chunks of a large move.
        chunk_nbytes: Bytes of each, as near as the instance's chunks of so many tokens allow.
        rounds: Large moves there, and as many back.
    """

    chunk_count: int
    chunk_nbytes: int
    rounds: int


class _StoppedError(Exception):
    """A signal has asked for the end."""


def bench(source: str, target: str, sizes: Sizes, via: str | None, *, as_json: bool) -> None:
    """Measure and print; both instances hold afterwards what they held before.

    Raises:
        ConfigError: torch isn't installed, or no prompt or chunk can have these sizes.
        FailureError: An instance can't take part, or has too little room.
        NodeUnreachableError: No node answers, or the source isn't on this host.
        typer.Exit: Something was left behind; stderr tells what.
    """
    if source == target:
        raise typer.BadParameter("SOURCE and TARGET are one instance; name two")
    with open_client(via, os.environ) as client:
        ends = find_end(client, source, os.environ), find_end(client, target, os.environ)
        with alone(local_source(ends[0])), _stop_check() as check_stop:
            chunks = _own_chunks(*ends, sizes)
            run = _Run(client, chunks, sizes, check_stop)
            left = run.measure()
    report = run.report()
    typer.echo(json.dumps(report.fields()) if as_json else report.text())
    if left is not None:
        raise typer.Exit(ExitCode.FAILED)


def _own_chunks(source: End, target: End, sizes: Sizes) -> "OwnChunks":
    try:
        from p2pkv.commands.bench_chunks import OwnChunks
    except ImportError as error:
        raise ConfigError(f"p2pkv bench stores chunks as an engine does: install p2pkv[engines] ({error})") from error
    return OwnChunks(source, target, sizes.chunk_count, sizes.chunk_nbytes)


@contextmanager
def _stop_check() -> Iterator[Callable[[], None]]:
    """Gives what raises `_StoppedError` once a signal has asked for the end."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in SIGNALS}

    def check() -> None:
        if asked:
            raise _StoppedError

    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """One bench, from the first check to the last clearing."""

    def __init__(self, client: NodeClient, chunks: "OwnChunks", sizes: Sizes, check_stop: Callable[[], None]) -> None:
        self._client = client
        self._chunks = chunks
        self._sizes = sizes
        self._check_stop = check_stop
        self._open_event: str | None = None
        self._is_whole = False
        there, back = (f"{old.instance} -> {new.instance}" for old, new in self._ways)
        large, small = f"{sizes.chunk_count} chunks", f"{len(chunks.small.tokens)} tokens"
        self._large_rows = tuple((Row(f"{large}, {way}", "ms"), Row(f"{large}, {way}", "GiB/s")) for way in (there, back))
        self._small_rows = tuple(Row(f"{small}, {way}", "ms") for way in (there, back))
        self._lookup_rows = tuple(Row(f"/lookup of {len(each.tokens)} tokens", "ms") for each in (chunks.large, chunks.small))

    @property
    def _ways(self) -> tuple[tuple[End, End], tuple[End, End]]:
        source, target = self._chunks.source, self._chunks.target
        return (source, target), (target, source)

    def report(self) -> Report:
        """What was measured so far."""
        chunks = self._chunks
        rows = [*(row for pair in self._large_rows for row in pair), *self._small_rows, *self._lookup_rows]
        return Report(
            chunks.source.instance, chunks.target.instance, self._sizes.chunk_count, chunks.chunk_nbytes, rows, self._is_whole
        )

    def measure(self) -> str | None:
        """Store, move there and back, and clear, whatever happens in between.

        Returns:
            What couldn't be cleared, which stderr tells in any case; None when all is as it was.
        """
        need = self._chunks.large.charged_nbytes + self._chunks.small.charged_nbytes
        for end in (self._chunks.source, self._chunks.target):
            self._chunks.forget(end)  # what a bench that was killed has left
            check_room(self._client, end, need)
        try:
            with _progress(self._sizes.rounds + 1) as advance:
                for _ in self._chunks.store():
                    self._check_stop()
                advance()
                for _ in range(self._sizes.rounds):
                    self._round()
                    advance()
            self._is_whole = True
        except _StoppedError:
            pass
        finally:
            left = self._chunks.clear(self._client, self._open_event, os.environ)
            if left is not None:
                typer.echo(f"Error: {left}", err=True)
        return left

    def _round(self) -> None:
        large, small = self._chunks.large, self._chunks.small
        for (old, new), (time_row, rate_row) in zip(self._ways, self._large_rows, strict=True):
            seconds, lane = self._move(large, old, new)
            time_row.add(seconds * 1000, lane)
            rate_row.add(self._sizes.chunk_count * self._chunks.chunk_nbytes / 2**30 / seconds, lane)
        for _ in range(SMALL_PER_ROUND):
            for (old, new), row in zip(self._ways, self._small_rows, strict=True):
                seconds, lane = self._move(small, old, new)
                row.add(seconds * 1000, lane)
            for prompt, row in zip((large, small), self._lookup_rows, strict=True):
                row.add(self._lookup(prompt) * 1000)

    def _move(self, prompt: "Prompt", old: End, new: End) -> tuple[float, str]:
        """Move a prompt; the seconds from the request to `done`, and the lane. Afterwards the lookup says so."""
        self._check_stop()
        check_room(self._client, new, prompt.charged_nbytes)
        body = {**self._chunks.move_body(prompt, old, new), "wait_s": WAIT_S}
        began = time.perf_counter()
        answer = self._client.ask("POST", "/move", body)
        self._open_event, state = answer["event_id"], answer["state"]
        while state in UNFINISHED:
            self._check_stop()
            time.sleep(ASK_S)
            state = self._client.ask("POST", "/check_finish", {"event_id": self._open_event})["status"]
        seconds = time.perf_counter() - began
        event = self._client.ask("GET", event_path(answer["event_id"]))
        self._open_event = None
        if (event["state"], event["num_tokens"]) != ("done", len(prompt.tokens)):
            why = f": {event['error']['detail']}" if event["error"] else ""
            raise P2pkvError(f"a move of {event['num_tokens']} tokens to {new.instance} ended {event['state']}{why}")
        self._check_holder(prompt, new)
        return seconds, event["lane"]

    def _check_holder(self, prompt: "Prompt", holder: End) -> None:
        expected = {holder.instance: [Location.LOCAL_CPU, len(prompt.tokens)]}
        deadline = time.monotonic() + VIEW_S
        while (seen := self._client.ask("POST", "/lookup", self._chunks.lookup_body(prompt))["layout_info"]) != expected:
            self._check_stop()
            if time.monotonic() > deadline:
                raise P2pkvError(f"after a move to {holder.instance} that was done, the lookup says {seen}")
            time.sleep(POLL_S)

    def _lookup(self, prompt: "Prompt") -> float:
        self._check_stop()
        began = time.perf_counter()
        self._client.ask("POST", "/lookup", self._chunks.lookup_body(prompt))
        return time.perf_counter() - began


@contextmanager
def _progress(step_count: int) -> Iterator[Callable[[], None]]:
    """A bar in a terminal, one step for each call of what it gives."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("storing, then rounds", total=step_count)
        yield lambda: progress.advance(bar)

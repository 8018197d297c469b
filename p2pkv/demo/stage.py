"""What the demo shows and notes: commands as a user would type them, what came back, and what was checked."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
import trio
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection, open_websocket_url

from p2pkv.commands.client import NodeClient, Reply
from p2pkv.core.records import EventState
from p2pkv.errors import NodeUnreachableError, P2pkvError

CALL_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that should be so, and what was seen."""

    what: str
    is_true: bool
    seen: str


class Stage:
    """Where the demo plays: makes calls, shows them on `console`, and keeps what was checked.

    Every call raises `P2pkvError` when it isn't answered, or answered with a refusal.
    """

    def __init__(self, console: Console) -> None:
        self.checks: list[Check] = []
        self._console = console

    def say(self, title: str) -> None:
        """Begin a scene."""
        self._console.print(f"\n[bold cyan]{escape(title)}[/]")

    def type(self, command: str) -> None:
        """Show a command."""
        self._console.print(f"[bold]$ {escape(command)}[/]")

    def show(self, text: str) -> None:
        """Show what came back."""
        self._console.print(escape(text))

    def check(self, what: str, is_true: bool, seen: str) -> None:  # noqa: FBT001 - it is what the check is about
        """Keep something that was checked."""
        self.checks.append(Check(what, is_true, seen))

    def table(self) -> Table:
        """All that was checked."""
        table = Table(title="What was checked", title_justify="left", show_edge=False)
        table.add_column("")
        table.add_column("what should be so")
        table.add_column("what was seen")
        for check in self.checks:
            mark = "[green]yes[/]" if check.is_true else "[red]NO[/]"
            table.add_row(mark, escape(check.what), escape(check.seen))
        return table

    def post(self, url: str, body: Mapping[str, object]) -> dict[str, Any]:
        """Make a POST call; the answer's object."""
        self.type(_curl(url, body))
        return self._answered(_call("POST", url, body))

    def get(self, url: str) -> dict[str, Any]:
        """Make a GET call; the answer's object."""
        self.type(f"curl {url}")
        return self._answered(_call("GET", url))

    def grep(self, url: str, start: str) -> list[str]:
        """Get a text; those of its lines that begin with `start`."""
        self.type(f"curl -s {url} | grep ^{start}")
        try:
            reply = httpx2.get(url, timeout=CALL_S, trust_env=False)
        except httpx2.TransportError as error:
            raise P2pkvError(f"nothing answers at {url}: {error}") from error
        lines = [line for line in reply.text.splitlines() if line.startswith(start)]
        self.show("\n".join(lines))
        return lines

    def post_until(
        self, url: str, body: Mapping[str, object], is_there: Callable[[dict[str, Any]], bool], *, within_s: float
    ) -> dict[str, Any]:
        """Make a POST call again and again until `is_there`, or should have been; the last answer is shown."""
        reply = _call_until(lambda: _call("POST", url, body), is_there, within_s)
        self.type(_curl(url, body))
        return self._answered(reply)

    def get_until(self, url: str, is_there: Callable[[dict[str, Any]], bool], *, within_s: float) -> dict[str, Any]:
        """As `post_until`, for a GET call."""
        reply = _call_until(lambda: _call("GET", url), is_there, within_s)
        self.type(f"curl {url}")
        return self._answered(reply)

    async def converse(self, url: str, move: Mapping[str, object]) -> dict[str, Any]:
        """Ask for a move over the websocket at `url` and watch it; the event at its end."""
        self.type(f"websocat {url}")
        try:
            last = await self._ask_and_watch(url, move)
        except* (HandshakeError, ConnectionClosed, trio.TooSlowError) as errors:
            raise P2pkvError(f"the websocket at {url} failed: {errors.exceptions[0]!r}") from errors
        if last["type"] == "error":
            raise P2pkvError(f"the websocket answered with {json.dumps(last)}")
        return last

    async def _ask_and_watch(self, url: str, move: Mapping[str, object]) -> dict[str, Any]:
        """The event at its end, or the error that came instead."""
        with trio.fail_after(CALL_S):
            async with open_websocket_url(url) as websocket:
                message = await self._ask(websocket, {"id": 1, "type": "move", **move})
                if message["type"] == "move":
                    message = await self._ask(websocket, {"id": 2, "type": "watch", "event_id": message["event_id"]})
                while message["type"] == "watch" or (message["type"] == "event" and not EventState(message["state"]).is_final):
                    message = await self._receive(websocket)
                return message

    async def _ask(self, websocket: WebSocketConnection, message: Mapping[str, object]) -> dict[str, Any]:
        self.show(f"> {json.dumps(message)}")
        await websocket.send_message(json.dumps(message))
        return await self._receive(websocket)

    async def _receive(self, websocket: WebSocketConnection) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await websocket.get_message())
        self.show(f"< {json.dumps(message)}")
        return message

    def _answered(self, reply: Reply) -> dict[str, Any]:
        self.show(json.dumps(reply.body))
        if not reply.is_success:
            raise P2pkvError(f"the call was answered with {reply.status}: {json.dumps(reply.body)}")
        return reply.body


def _call(method: str, url: str, body: Mapping[str, object] | None = None) -> Reply:
    with httpx2.Client(timeout=CALL_S, trust_env=False) as http:
        return NodeClient(http).call(method, url, body)


def _call_until(call: Callable[[], Reply], is_there: Callable[[dict[str, Any]], bool], within_s: float) -> Reply:
    """The answer with which it is there, or the last; a node that doesn't answer yet may do so next time."""
    deadline = time.monotonic() + within_s
    while True:
        is_last = time.monotonic() >= deadline
        try:
            reply = call()
        except NodeUnreachableError:
            if is_last:
                raise
        else:
            if is_last or is_there(reply.body):
                return reply
        time.sleep(POLL_S)


def _curl(url: str, body: Mapping[str, object]) -> str:
    fields = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in body.items())
    return f"curl -X POST {url} \\\n  -H \"Content-Type: application/json\" \\\n  -d '{{\n{fields}\n  }}'"

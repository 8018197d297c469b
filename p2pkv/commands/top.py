"""`p2pkv top`: the cluster as one node sees it, once, or again and again until Ctrl-C or `q`."""

import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from p2pkv.commands.client import NodeClient, open_client
from p2pkv.commands.output import table
from p2pkv.commands.top_view import (
    UNFINISHED,
    Snapshot,
    Table,
    event_table,
    member_table,
    recent,
    shares_of_height,
    time_text,
)
from p2pkv.core.records import MemberState
from p2pkv.errors import NodeUnreachableError, P2pkvError, UnknownNameError
from p2pkv.http_paths import event_path

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

ANSWER_S = 3.0
"""A node answers within milliseconds; one that takes so long is stopped or lost, and another may know more."""
TRIES = 3
"""Nodes asked before the screen says that none answers."""
ASKED_MEMBERS = 64
"""Of more members than a screen has lines, nobody reads when they were heard; each is a call."""
ASKED_EVENTS = 16
"""As many moves under way are asked after; the others are shown as the node last heard of them."""


def top(via: str | None, environ: Mapping[str, str], *, interval_s: float, once: bool, as_json: bool) -> None:
    """Show the cluster.

    Args:
        via: The one node to ask; None to ask the first that answers, and another one when it no longer does.
        environ: Where nodes are found, if `via` doesn't say so.
        interval_s: Seconds from one picture to the next.
        once: Print one picture as plain text, as is done where no terminal is.
        as_json: Print one picture as JSON.

    Raises:
        NodeUnreachableError: No node answers at the beginning. Later the screen says so, and it is tried again.
    """
    from rich.console import Console

    with ExitStack() as stack:
        nodes = Nodes(stack, via, environ)
        snapshot = nodes.ask()
        console = Console(highlight=False)
        if as_json:
            typer.echo(json.dumps(snapshot.fields()))
        elif once or not console.is_terminal or console.is_dumb_terminal:
            typer.echo(_plain(snapshot, console.width if console.is_terminal else None))
        else:
            _watch(console, nodes, snapshot, interval_s)


# --- the node that is asked -----------------------------------------------------------------------------------------------


def take_snapshot(client: NodeClient) -> Snapshot:
    """Ask a node for all that is shown.

    Raises:
        NodeUnreachableError: It doesn't answer.
        P2pkvError: It refuses.
    """
    known = client.ask("GET", "/members")
    listed = client.ask("GET", "/events")["events"]
    met = {member["instance"]: _met_at(client, member["instance"]) for member in known["members"][:ASKED_MEMBERS]}
    members = []
    for member in known["members"]:
        joined_at, heard_at = met.get(member["instance"], (None, None))
        members.append({**member, "joined_at": joined_at, "heard_at": heard_at})
    now = time.time()
    events = recent(listed, now)
    fresh = [_event(client, event) for event in events[:ASKED_EVENTS] if event["state"] in UNFINISHED]
    return Snapshot(client.url, known["instance"], now, members, recent([*fresh, *events[len(fresh) :]], now))


def _met_at(client: NodeClient, instance: str) -> tuple[float | None, float | None]:
    try:
        worker = client.ask("POST", "/query_worker_info", {"instance_id": instance})["worker_infos"][0]
    except UnknownNameError:  # forgotten since the list of members was made
        return None, None
    return worker["registration_time"], worker["last_heartbeat_time"]


def _event(client: NodeClient, listed: Mapping[str, Any]) -> Mapping[str, Any]:
    """An event as its source has it now, which the coordinator hears of only when it asks; as listed if that can't be had."""
    reply = client.call("GET", event_path(listed["event_id"]))
    return reply.body if reply.is_success else listed


class Nodes:
    """The node that is asked, and who else may be when it is lost.

    Args:
        stack: Closes the connections.
        via: The only one to ask, if there is only one.
        environ: Where the first one is found.
    """

    def __init__(self, stack: ExitStack, via: str | None, environ: Mapping[str, str]) -> None:
        self._may_change = via is None
        self._environ = environ
        self._connection = stack.enter_context(ExitStack())
        self._client = self._open(via)
        self._others: list[str] = []

    def _open(self, url: str | None) -> NodeClient:
        return self._connection.enter_context(open_client(url, self._environ, answer_s=ANSWER_S))

    def ask(self) -> Snapshot:
        """The cluster as it is now.

        Raises:
            NodeUnreachableError: Neither this node nor, where that is allowed, any of the next ones answers.
        """
        tries = min(TRIES, 1 + len(self._others)) if self._may_change else 1
        for attempt in range(tries):
            try:
                snapshot = take_snapshot(self._client)
            except NodeUnreachableError:
                if self._may_change and self._others:
                    self._turn_to_next()
                if attempt == tries - 1:
                    raise
            else:
                self._others = _urls_of(snapshot)
                return snapshot
        raise AssertionError("it is tried at least once")

    def _turn_to_next(self) -> None:
        self._others.append(self._client.url)
        self._connection.close()
        self._client = self._open(self._others.pop(0))


def _urls_of(snapshot: Snapshot) -> list[str]:
    """Where members answer, the living ones first; behind a shared port the asked one's own address is among them."""
    members = sorted(snapshot.members, key=lambda member: (not _is_living(member), member["instance"]))
    return [member["http"] for member in members if member["http"] != snapshot.url and member["http"]]


# --- one picture ----------------------------------------------------------------------------------------------------------


def _plain(snapshot: Snapshot, width: int | None) -> str:
    members, events = member_table(snapshot), event_table(snapshot)
    if width is not None:
        members, events = members.fitted(width), events.fitted(width)
    return "\n\n".join((_text(members), _text(events) if events.rows else "no moves lately"))


def _text(shown: Table) -> str:
    return table([column.name for column in shown.columns], shown.rows)


# --- the screen -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Trouble:
    """No node answers: why, and since when."""

    why: str
    began_at: float


def _watch(console: "Console", nodes: Nodes, snapshot: Snapshot, interval_s: float) -> None:
    from rich.live import Live

    trouble: _Trouble | None = None
    # The alternate screen is written over in place, a picture at a time: nothing is cleared, so nothing flickers.
    with _keys() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            live.update(_screen(console, snapshot, trouble, interval_s), refresh=True)
            # A node with thousands of events takes a while; it shall have at least as long to itself.
            if _is_q_pressed(keyboard, max(interval_s, (time.monotonic() - began) / 2)):
                return
            try:
                snapshot, trouble = nodes.ask(), None
            except P2pkvError as error:
                trouble = _Trouble(str(error), trouble.began_at if trouble else time.time())


def _screen(console: "Console", snapshot: Snapshot, trouble: _Trouble | None, interval_s: float) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    members, events = member_table(snapshot), event_table(snapshot)
    heads = 7  # two lines of the screen's own, two tables' heads, an empty line before each, and what isn't shown
    member_rows, event_rows = shares_of_height(console.height - heads, len(members.rows), len(events.rows))
    if trouble is None:
        told = Text(f"asked {snapshot.instance} at {snapshot.url}", style="dim")
    else:
        told = Text(f"no answer for {time_text(time.time() - trouble.began_at)}, trying again: {trouble.why}", style="bold red")
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot.at))
    head = Text(f"p2pkv top  {clock}  {_living(snapshot)}  every {interval_s:g} s, q ends it", style="bold")
    hidden = len(members.rows) - member_rows + len(events.rows) - event_rows
    parts = [
        *(head, told, Text()),
        *(_drawn(members, member_rows, console.width), Text()),
        _drawn(events, event_rows, console.width) if events.rows else Text("no moves lately", style="dim"),
        Text(f"{hidden} more have no room" if hidden else "", style="dim"),
    ]
    for part in parts:
        if isinstance(part, Text):
            part.no_wrap, part.overflow = True, "ellipsis"
    return Group(*parts)


def _living(snapshot: Snapshot) -> str:
    return f"{sum(map(_is_living, snapshot.members))} of {len(snapshot.members)} alive"


def _is_living(member: Mapping[str, Any]) -> bool:
    return MemberState(member["state"]).is_living


def _drawn(shown: Table, row_count: int, width: int) -> "RenderableType":
    from rich.table import Table as RichTable
    from rich.text import Text

    fitted = Table(shown.columns, shown.rows[:row_count]).fitted(width)
    drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="reverse")
    for column in fitted.columns:
        drawn.add_column(column.name, justify="right" if column.is_number else "left", no_wrap=True, overflow="ellipsis")
    for row in fitted.rows:
        drawn.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return drawn


_STYLES = {
    "alive": "green",
    "suspect": "yellow",
    "dead": "bold red",
    "left": "dim",
    "pending": "yellow",
    "running": "yellow",
    "partial": "red",
    "failed": "bold red",
    "cancelled": "magenta",
}
"""Of cells that say one of these."""


@contextmanager
def _keys() -> Iterator[int | None]:
    """The keyboard, each key as it is pressed; None where there is none. What it did before it does again on exit."""
    if not sys.stdin.isatty():
        yield None
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _is_q_pressed(keyboard: int | None, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while keyboard is not None and (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([keyboard], [], [], left)
        if ready:
            pressed = os.read(keyboard, 64)
            if b"q" in pressed or not pressed:  # nothing to read: the terminal is gone
                return True
    time.sleep(max(deadline - time.monotonic(), 0))
    return False

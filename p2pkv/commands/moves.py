"""`p2pkv move`: ask a node for a move, and wait for its end if wanted."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from p2pkv.commands.client import NodeClient, Reply
from p2pkv.http_paths import event_path

QUICK_S = 1.0
"""What ends within this needs no progress bar."""
POLL_S = 0.2
UNFINISHED = frozenset({"pending", "running"})


def move_and_wait(client: NodeClient, body: Mapping[str, object]) -> Reply:
    """Start a move and stay until it has ended, with a progress bar in a terminal if that takes long.

    Returns:
        The answer to `/move`, with the state that the move ended in, and why if not well.
    """
    reply = client.call("POST", "/move", {**body, "wait_s": QUICK_S})
    if not reply.is_success or reply.body["state"] not in UNFINISHED:
        return reply
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("moving", total=None, told="")
        while True:
            event = client.call("GET", event_path(reply.body["event_id"]))
            if not event.is_success:
                return event
            if event.body["state"] not in UNFINISHED:
                return replace(reply, body={**reply.body, "state": event.body["state"], **(event.body["error"] or {})})
            found, settled, told = _progress_of(event.body)
            # Until chunks are handed over, only the bytes tell how far it is, and nobody knows how many there will be.
            progress.update(bar, total=found if settled else None, completed=settled, told=told)
            time.sleep(POLL_S)


def _progress_of(event: Mapping[str, Any]) -> tuple[int, int, str]:
    """Chunks in all, those whose fate is known, and the same in words."""
    chunks = event["chunks"]
    found = chunks["found"]
    settled = sum(chunks.values()) - found
    return found, settled, f"{settled} of {found} chunks, {event['bytes'] / 2**20:.0f} MiB carried"

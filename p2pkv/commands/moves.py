"""`p2pkv move`: ask a node for a move, and wait for its end if wanted."""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace

from p2pkv.commands.client import NodeClient, Reply

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
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("moving chunks", total=None)
        while True:
            event = client.call("GET", f"/events/{reply.body['event_id']}")
            if not event.is_success:
                return event
            if event.body["state"] not in UNFINISHED:
                return replace(reply, body={**reply.body, "state": event.body["state"], **(event.body["error"] or {})})
            chunks = event.body["chunks"]
            progress.update(bar, total=chunks["found"], completed=sum(chunks.values()) - chunks["found"])
            time.sleep(POLL_S)

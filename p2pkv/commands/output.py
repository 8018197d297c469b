"""What commands print: for people, or one JSON object for programs."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from p2pkv.commands.client import Reply
from p2pkv.commands.exit_codes import ExitCode
from p2pkv.errors import ErrorCode

ENDED_BADLY = frozenset({"partial", "failed", "cancelled"})


Say = Callable[[Mapping[str, Any]], str]


def show(reply: Reply, say: Say, *, as_json: bool) -> None:
    """Print a node's answer: as JSON, or what `say` makes of it for people.

    Raises:
        typer.Exit: The call was refused or what it asked for failed; the exit code says which.
    """
    _show(reply, say, as_json=as_json)
    if reply.body.get("state") in ENDED_BADLY:
        raise typer.Exit(ExitCode.FAILED)


def show_cancelled(reply: Reply, say: Say, *, as_json: bool) -> None:
    """As `show`, of a move that should end as cancelled: anything else is a failure."""
    _show(reply, say, as_json=as_json)
    if reply.body["state"] != "cancelled":
        raise typer.Exit(ExitCode.FAILED)


def _show(reply: Reply, say: Say, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(reply.body))
    elif reply.is_success:
        typer.echo(say(reply.body))
    else:
        typer.echo(f"Error: {reply.body.get('detail', reply.body)}", err=True)
    if reply.body.get("error") == ErrorCode.INVALID_REQUEST:
        raise typer.Exit(ExitCode.WRONG_USAGE)
    if not reply.is_success:
        raise typer.Exit(ExitCode.FAILED)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Left-aligned columns under their names."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def event_text(event: Mapping[str, Any]) -> str:
    """An event in two lines."""
    chunks, (source, target) = event["chunks"], (event["old_position"], event["new_position"])
    verb = "copy" if event["copy"] else "move"
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in chunks.items())
    lane = f" by {event['lane']}" if event["lane"] else ""
    seconds = f" in {event['seconds']:.3f} s" if event["seconds"] is not None else ""
    problem = f"\n  {event['error']['detail']}" if event["error"] else ""
    return (
        f"{event['event_id']}: {event['state']}\n"
        f"  {verb} of {event['num_tokens']} tokens from {'/'.join(source)} to {'/'.join(target)}{lane}{seconds}\n"
        f"  chunks: {counts}; {event['bytes']} bytes{problem}"
    )


def members_text(answer: Mapping[str, Any]) -> str:
    """A line for each member's location."""
    rows = [
        (member["instance"], member["state"], location, held["chunks"], f"{held['bytes'] / 2**20:.1f} MiB", member["http"])
        for member in answer["members"]
        for location, held in sorted(member["locations"].items())
    ]
    return table(("INSTANCE", "STATE", "LOCATION", "CHUNKS", "HELD", "HTTP"), rows)


def move_text(answer: Mapping[str, Any]) -> str:
    """What became of a move."""
    problem = f": {answer['detail']}" if "detail" in answer else ""
    return f"{answer['event_id']}: {answer['state']}, {answer['num_tokens']} tokens{problem}"


def lookup_text(answer: Mapping[str, Any]) -> str:
    """A line for each holder."""
    layout = answer["layout_info"]
    if not layout:
        return "no instance holds any of it"
    return table(("INSTANCE", "LOCATION", "TOKENS"), [(instance, *held) for instance, held in sorted(layout.items())])


def events_text(answer: Mapping[str, Any]) -> str:
    """A line for each event."""
    rows = [
        (
            event["event_id"],
            event["state"],
            "copy" if event["copy"] else "move",
            "/".join(event["old_position"]),
            "/".join(event["new_position"]),
            event["num_tokens"],
        )
        for event in answer["events"]
    ]
    return table(("EVENT", "STATE", "KIND", "FROM", "TO", "TOKENS"), rows) if rows else "no events"


def clear_text(answer: Mapping[str, Any]) -> str:
    """How much was forgotten."""
    return f"{answer['num_tokens']} tokens cleared"


def pin_text(answer: Mapping[str, Any]) -> str:
    """How much is pinned now."""
    return f"pinned {answer['num_tokens']} tokens"


def unpin_text(answer: Mapping[str, Any]) -> str:
    """How much was pinned."""
    return f"unpinned {answer['num_tokens']} tokens"


def health_text(answer: Mapping[str, Any]) -> str:
    """That all is well; anything else is an error."""
    workers = len(answer["error_codes"])
    return f"alive, {workers} worker{'s' if workers > 1 else ''}"

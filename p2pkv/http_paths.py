"""Paths of a node's HTTP that say what is asked for."""

from urllib.parse import quote


def event_path(event_id: str) -> str:
    """Where every node has an event. Escaped: what a user gave may be no id."""
    return f"/events/{quote(event_id, safe='')}"

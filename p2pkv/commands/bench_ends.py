"""The two ends of `p2pkv bench`: what can be said of them before anything is stored, and their engines' caches."""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from p2pkv.commands.client import NodeClient
from p2pkv.commands.top_view import size_text
from p2pkv.config import NodeConfig
from p2pkv.core.ids import Location, is_instance_id
from p2pkv.core.records import MemberState
from p2pkv.errors import ErrorCode, Failure, NodeUnreachableError, P2pkvError, failure_error
from p2pkv.rendezvous import Place, is_living, place_of, read_card, runtime_directory

VIEW_S = 2.0
"""So long after a change every node knows of it: what is promised of lookups, and what gossip keeps to for the rest."""
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class End:
    """An instance that takes part.

    Attributes:
        instance: Its name.
        http: Where its own node answers.
        local: Its place on this host, and what leads an engine there; None when it runs elsewhere, or as another user.
    """

    instance: str
    http: str
    local: "Local | None"


@dataclass(frozen=True, slots=True)
class Local:
    """An instance of this user on this host."""

    place: Place
    config: NodeConfig


def find_end(client: NodeClient, instance: str, environ: Mapping[str, str]) -> End:
    """An instance, as the asked node knows it.

    Raises:
        FailureError: It isn't known, isn't alive, or stores nothing.
    """
    member = _member(client, instance)
    return End(instance, member["http"], _local(member, environ))


def check_room(client: NodeClient, end: End, need_nbytes: int) -> None:
    """Refuse to go on where that would evict somebody's chunks.

    Raises:
        StoreFullError: There is less room than `need_nbytes`.
    """
    deadline = time.monotonic() + VIEW_S
    while (free := _free_nbytes(client, end)) < need_nbytes:
        if time.monotonic() < deadline:
            time.sleep(POLL_S)
            continue
        detail = (
            f"{end.instance} has {size_text(free)} free and this takes {size_text(need_nbytes)}: "
            "to go on would evict what is held there. Ask for fewer or smaller chunks, or clear it first."
        )
        raise failure_error(Failure(ErrorCode.STORE_FULL, detail))


def _free_nbytes(client: NodeClient, end: End) -> int:
    held = _member(client, end.instance)["locations"][Location.LOCAL_CPU]
    free: int = held["limit"] - held["bytes"]
    return free


def _member(client: NodeClient, instance: str) -> dict[str, Any]:
    members = client.ask("GET", "/members")["members"]
    member = next((each for each in members if each["instance"] == instance), None)
    if member is None:
        known = ", ".join(each["instance"] for each in members)
        raise failure_error(Failure(ErrorCode.UNKNOWN_INSTANCE, f"No instance is named {instance!r}; known are {known}."))
    if not MemberState(member["state"]).is_living:
        raise failure_error(Failure(ErrorCode.INSTANCE_UNREACHABLE, f"Instance {instance!r} is {member['state']}."))
    if Location.LOCAL_CPU not in member["locations"]:
        raise failure_error(Failure(ErrorCode.UNKNOWN_LOCATION, f"Instance {instance!r} stores nothing."))
    found: dict[str, Any] = member
    return found


def _local(member: Mapping[str, Any], environ: Mapping[str, str]) -> Local | None:
    """Its place in the runtime directory, in whichever cluster; an instance of that name but another boot is another one."""
    directory, instance = runtime_directory(environ), member["instance"]
    for cluster in sorted(folder.name for folder in directory.iterdir() if is_instance_id(folder.name)):
        place = place_of(directory, cluster, instance)
        card = read_card(place)
        if card is not None and card.generation == member["generation"] and is_living(place):
            return Local(place, NodeConfig(lmcache_instance_id=instance, lmcache_worker_port=0, cluster=cluster))
    return None


def local_source(end: End) -> Local:
    """Where the bench attaches.

    Raises:
        NodeUnreachableError: It can't: the instance isn't here.
    """
    if end.local is None:
        raise NodeUnreachableError(
            f"{end.instance} has no node of this user on this host, and bench stores its chunks through the node's unix "
            f"socket: run it where {end.instance} runs, or name another source"
        )
    return end.local


@contextmanager
def alone(source: Local) -> Iterator[None]:
    """Be the only bench from this source: two would clear each other's chunks.

    Raises:
        P2pkvError: Another one runs.
    """
    path = source.place.folder / "bench.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise P2pkvError(f"another p2pkv bench from {source.place.instance} is running") from None
        yield
    finally:
        os.close(descriptor)

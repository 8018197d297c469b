"""The calls about one instance: any node answers them for any instance, from its own view or by passing the question on."""

import re
from bisect import bisect_right
from ipaddress import ip_address
from math import inf

from p2pkv.config import is_loopback
from p2pkv.core.effects import AnswerValue
from p2pkv.core.events import ClearRequested, PinRequested
from p2pkv.core.ids import InstanceId, Location
from p2pkv.core.keys import Identity
from p2pkv.core.records import MemberRecord, Pinning
from p2pkv.core.rows import InventoryEntry
from p2pkv.errors import (
    ErrorCode,
    Failure,
    InvalidRequestError,
    NotOfferedError,
    UnknownLocationError,
    UnknownNameError,
    failure_error,
)
from p2pkv.net.driver import Driver
from p2pkv.net.replies import (
    ChangedReply,
    EmptyReply,
    HealthReply,
    InventoryReply,
    QueryInstanceReply,
    QueryWorkerInfoReply,
    WorkerInfoReply,
    call_id,
    inventory_item,
)
from p2pkv.net.requests import (
    CompressBody,
    HealthBody,
    InventoryBody,
    PinBody,
    PositionBody,
    QueryInstanceBody,
    QueryWorkerInfoBody,
    parse_location,
    parse_position,
)

INVENTORY_PAGE_ITEMS = 1000
_CURSOR = re.compile(r"([0-9a-f]{16})@(\w+)")


async def health(driver: Driver, body: HealthBody) -> HealthReply:
    """Whether an instance is alive, as far as this node knows: error code 0 for each of its workers."""
    workers = _worker_count(_living(driver, body.instance_id))
    return HealthReply(event_id=call_id("health"), error_codes={str(worker): 0 for worker in range(workers)})


async def query_instance(driver: Driver, body: QueryInstanceBody) -> QueryInstanceReply:
    """Which living instance is at an address; the first of several by name."""
    wanted = _canonical_host(body.ip)
    for member in driver.machine.members():
        if member.state.is_living and _canonical_host(member.ws.host) == wanted:
            return QueryInstanceReply(event_id=body.event_id or call_id("query_instance"), res=member.instance)
    detail = f"No living instance is known at {body.ip!r}. `p2pkv members` lists all with their addresses."
    raise UnknownNameError(Failure(ErrorCode.UNKNOWN_INSTANCE, detail))


async def query_worker_info(driver: Driver, body: QueryWorkerInfoBody) -> QueryWorkerInfoReply:
    """Where an instance's workers are reached, and when it was last heard."""
    member = _known(driver, body.instance_id)
    workers = range(_worker_count(member))
    wanted = workers if body.worker_ids is None else body.worker_ids
    if strange := [worker for worker in wanted if worker not in workers]:
        detail = f"Instance {member.instance!r} has no worker {strange[0]}; it has {len(workers)}, counted from 0."
        raise InvalidRequestError(Failure(ErrorCode.INVALID_REQUEST, detail))
    met_at = driver.machine.met_at(member.instance)
    joined_at, heard_at = (None, None) if met_at is None else met_at
    infos = [
        WorkerInfoReply(
            instance_id=member.instance,
            worker_id=worker,
            ip=member.ws.host,
            port=member.ws.port,
            peer_init_url=None if member.transfer is None else str(member.transfer),
            registration_time=joined_at,
            last_heartbeat_time=heard_at,
        )
        for worker in wanted
    ]
    return QueryWorkerInfoReply(event_id=call_id("query_worker_info"), worker_infos=infos)


async def clear(driver: Driver, body: PositionBody) -> ChangedReply:
    """Forget everything at a position, but what is pinned or a move is handing over; answers with the tokens that went."""
    position = parse_position((body.instance_id, body.location))
    return _changed("clear", await driver.request(lambda request: ClearRequested(request, position)))


async def pin(driver: Driver, body: PinBody) -> ChangedReply:
    """Keep the longest prefix of a prompt held at a position from eviction; answers with the tokens that are pinned now."""
    return await _pin(driver, body, Pinning.PIN, inf)


async def unpin(driver: Driver, body: PinBody) -> ChangedReply:
    """Let what was pinned of a prompt at a position go, now or in `ttl_s` seconds; answers with the tokens that were pinned."""
    return await _pin(driver, body, Pinning.UNPIN, 0.0)


async def _pin(driver: Driver, body: PinBody, pinning: Pinning, default_s: float) -> ChangedReply:
    position = parse_position((body.instance_id, body.location))
    answer = await driver.request(
        lambda request: PinRequested(
            request=request,
            position=position,
            pinning=pinning,
            ttl_s=default_s if body.ttl_s is None else body.ttl_s,
            tokens=body.tokens,
            identity=Identity(cache_salt=body.cache_salt),
            model=body.model,
        )
    )
    return _changed(pinning.value, answer)


def _changed(call: str, num_tokens: AnswerValue) -> ChangedReply:
    assert isinstance(num_tokens, int), num_tokens  # the core's promise for these requests
    return ChangedReply(event_id=call_id(call), num_tokens=num_tokens)


async def compress(_driver: Driver, _body: CompressBody) -> EmptyReply:
    """Not offered, nor is `/decompress`: chunks are kept as engines wrote them."""
    detail = "p2pkv keeps chunks as engines wrote them and compresses none; let the engine use a smaller KV cache dtype."
    raise NotOfferedError(Failure(ErrorCode.NOT_IMPLEMENTED, detail))


async def inventory(driver: Driver, body: InventoryBody) -> InventoryReply:
    """Which chunks an instance holds, as far as this node knows, in pages: `next` is the next one's `cursor`."""
    member = _living(driver, body.instance)
    location = None if body.location is None else parse_location(body.location)
    if location is not None and location not in {status.location for status in member.locations}:
        detail = f"Instance {member.instance!r} has no location {location.value!r}."
        raise UnknownLocationError(Failure(ErrorCode.UNKNOWN_LOCATION, detail))
    entries = [each for each in driver.machine.inventory_of(member.instance) if location in (None, each.location)]
    first = 0 if body.cursor is None else bisect_right(entries, _parse_cursor(body.cursor), key=_place)
    page = entries[first : first + INVENTORY_PAGE_ITEMS]
    is_last = first + len(page) == len(entries)
    return InventoryReply(items=list(map(inventory_item, page)), next=None if is_last else _cursor_after(page[-1]))


# --- instances ------------------------------------------------------------------------------------------------------------


def _known(driver: Driver, instance: InstanceId) -> MemberRecord:
    """An instance's record, whatever its state.

    Raises:
        UnknownNameError: It isn't known here.
    """
    for member in driver.machine.members():
        if member.instance == instance:
            return member
    failure = driver.machine.unreachable(instance)
    assert failure is not None, "who is no member is unknown"
    raise failure_error(failure)


def _living(driver: Driver, instance: InstanceId) -> MemberRecord:
    """An instance's record.

    Raises:
        UnknownNameError: It isn't known here.
        UnavailableError: It is dead, or has left.
    """
    if (failure := driver.machine.unreachable(instance)) is not None:
        raise failure_error(failure)
    return _known(driver, instance)


def _worker_count(member: MemberRecord) -> int:
    return max((namespace.world_size for namespace in member.namespaces), default=1)


def _canonical_host(host: str) -> str:
    """One writing for each address: people write `localhost`, and IPv6 in many ways."""
    try:
        return str(ip_address(host))
    except ValueError:
        return "127.0.0.1" if is_loopback(host.lower()) else host.lower()


# --- pages of an inventory ------------------------------------------------------------------------------------------------


def _place(entry: InventoryEntry) -> tuple[int, str]:
    """By which an inventory is ordered."""
    return entry.fingerprint, entry.location


def _cursor_after(entry: InventoryEntry) -> str:
    """Continues after `entry`, whatever comes and goes meanwhile."""
    return f"{entry.fingerprint:016x}@{entry.location}"


def _parse_cursor(cursor: str) -> tuple[int, str]:
    match = _CURSOR.fullmatch(cursor)
    if match is None or match[2] not in {location.value for location in Location}:
        detail = f"{cursor!r} is no cursor; take it from `next` of the page before."
        raise InvalidRequestError(Failure(ErrorCode.INVALID_REQUEST, detail))
    return int(match[1], 16), match[2]

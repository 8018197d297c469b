"""Small, valid things to test with: tokens, namespaces, chunks, records. Four tokens make a chunk, and a shard takes a page."""

from dataclasses import replace
from itertools import count
from typing import TypedDict, Unpack

from p2pkv.core.chunks import PAGE_NBYTES, Chunk
from p2pkv.core.config import MachineConfig
from p2pkv.core.ids import Address, EventId, InstanceId, Location, Position
from p2pkv.core.keys import (
    TOKEN_NBYTES,
    ChunkKey,
    Identity,
    Namespace,
    TokenBytes,
    chunk_key,
    namespace_digest,
    pack_tokens,
    root_key,
    token_count,
)
from p2pkv.core.prompt import Prompt
from p2pkv.core.records import (
    ChunkCounts,
    EventRecord,
    EventState,
    HandoffAddress,
    Lane,
    LocationStatus,
    MemberRecord,
    MemberState,
    Operation,
)
from p2pkv.core.rows import InventoryEntry

CPU = Location.LOCAL_CPU
CHUNK_SIZE = 4
NAMESPACE = Namespace(
    model="tiny",
    weights="0",
    dtype="float32",
    layers=1,
    planes=2,
    kv_heads=2,
    head_dim=1,
    chunk_size=CHUNK_SIZE,
    world_size=1,
)
IDENTITY = Identity()
DIGEST = namespace_digest(NAMESPACE)
ROOT = root_key(NAMESPACE, IDENTITY)
WALL_OFFSET_S = 1_000_000.0
MOVE_DEADLINE_S = 60.0
LEASE_S = 10.0
LEAVE_S = 2.0


def pack(*ids: int) -> TokenBytes:
    """Token ids as the core takes them."""
    return pack_tokens(ids)


def prompt(length: int, first: int = 0) -> TokenBytes:
    """`length` different token ids from `first` on; two prompts of one `first` share their beginning."""
    return pack(*range(first, first + length))


def sought(tokens: TokenBytes, root: ChunkKey = ROOT) -> Prompt:
    """A prompt to look for."""
    return Prompt(DIGEST, root, tokens, CHUNK_SIZE)


def chunks_of(tokens: TokenBytes, namespace: Namespace = NAMESPACE, identity: Identity = IDENTITY) -> list[Chunk]:
    """A prompt's chunks, the partly filled last one included."""
    found, parent = [], root_key(namespace, identity)
    step = namespace.chunk_size * TOKEN_NBYTES
    for begin in range(0, len(tokens), step):
        part = tokens[begin : begin + step]
        found.append(
            Chunk(
                key=chunk_key(parent, part),
                parent=parent,
                namespace=namespace_digest(namespace),
                start=begin // TOKEN_NBYTES,
                tokens=part,
                shard_nbytes=(namespace.shard_nbytes(token_count(part)),) * namespace.shard_count(),
            )
        )
        parent = found[-1].key
    return found


def keys_of(tokens: TokenBytes) -> list[ChunkKey]:
    """Keys of `chunks_of`."""
    return [chunk.key for chunk in chunks_of(tokens)]


def entry(fingerprint: int, tokens: int = CHUNK_SIZE, location: Location = CPU) -> InventoryEntry:
    """An inventory entry."""
    return InventoryEntry(fingerprint=fingerprint, location=location, token_count=tokens)


def at(instance: InstanceId, location: Location = CPU) -> Position:
    """A position, in LocalCPUBackend unless said otherwise."""
    return Position(instance, location)


def address_of(name: InstanceId) -> Address:
    """Where the websocket door of `name` listens."""
    return Address(name, 1)


class Limits(TypedDict, total=False):
    """What a test may want otherwise in a `MachineConfig`."""

    cluster: InstanceId
    ws: Address
    transfer: Address | None
    handoff: HandoffAddress | None
    chunk_size: int
    cpu_limit_nbytes: int
    descriptor_limit: int
    disk_limit_nbytes: int
    peer_fetch: bool
    log_changes: int
    views_nbytes: int


def config_of(name: InstanceId, generation: int = 1, **changes: Unpack[Limits]) -> MachineConfig:
    """A node's configuration, with room for 1,000 chunks."""
    config = MachineConfig(
        instance=name,
        generation=generation,
        cluster="test",
        ws=address_of(name),
        http=f"http://{name}",
        transfer=None,
        handoff=HandoffAddress(host_id="host", path=f"/{name}"),
        zone="",
        chunk_size=CHUNK_SIZE,
        cpu_limit_nbytes=1000 * PAGE_NBYTES,
        descriptor_limit=1000,
        move_deadline_s=MOVE_DEADLINE_S,
        lease_s=LEASE_S,
        leave_s=LEAVE_S,
        peer_fetch=False,
        wall_offset_s=WALL_OFFSET_S,
    )
    return replace(config, **changes)


def member(name: InstanceId, generation: int = 1, *namespaces: Namespace) -> MemberRecord:
    """A living member's record."""
    return MemberRecord(
        instance=name,
        generation=generation,
        incarnation=0,
        state=MemberState.ALIVE,
        ws=address_of(name),
        http=f"http://{name}",
        transfer=None,
        handoff=HandoffAddress(host_id="host", path=f"/{name}"),
        zone="",
        namespaces=namespaces,
        locations=(LocationStatus(CPU, chunk_count=0, nbytes=0, limit_nbytes=1000 * PAGE_NBYTES),),
    )


_event_numbers = count()


def event_id(source: InstanceId, target: InstanceId, coordinator: InstanceId) -> EventId:
    """An event id that no other call returns."""
    return f"move~{source}~{target}~{coordinator}~{next(_event_numbers):016x}"


def event_record(
    name: EventId,
    state: EventState = EventState.RUNNING,
    chunks: ChunkCounts | None = None,
    *,
    source: InstanceId = "a",
    target: InstanceId = "b",
    started_at: float = 0.0,
) -> EventRecord:
    """An event of a move from `source` to `target`."""
    return EventRecord(
        event_id=name,
        state=state,
        old_position=at(source),
        new_position=at(target),
        operation=Operation.MOVE,
        chunks=chunks or ChunkCounts(),
        num_tokens=0,
        nbytes=0,
        lane=Lane.HANDOFF,
        started_at=started_at,
        finished_at=None,
        coordinator=source,
        error=None,
    )

"""What a machine is told once, at its start."""

from dataclasses import dataclass

from p2pkv.core.ids import Address, Generation, InstanceId
from p2pkv.core.inventory import LOG_CHANGES
from p2pkv.core.records import HandoffAddress
from p2pkv.core.timers import TimersOf, lan


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """One instance's fixed facts and limits.

    Attributes:
        instance: Its name.
        generation: Which boot this is.
        cluster: Nodes of other clusters are turned away.
        ws: Where its websocket door listens.
        http: URL of its own HTTP shim.
        transfer: Where it serves chunks over TCP; None to not serve any.
        handoff: Where it hands descriptors over; None to never do so, and never take any.
        zone: In the operator's words.
        chunk_size: Tokens in a full chunk.
        cpu_limit_nbytes: Hard limit of LocalCPUBackend, pages counted whole; 0 to have no such location.
        descriptor_limit: Hard limit on shards held in memory, a descriptor each.
        move_deadline_s: A move ends by then.
        lease_s: A lease not renewed ends by then.
        leave_s: A leaving node is gone by then.
        peer_fetch: Whether a lookup that misses fetches a copy from a peer.
        wall_offset_s: Unix time minus the clock that `now` comes from; for what people read.
        log_changes: How many of its inventory's last changes an instance keeps for peers that lag.
        views_nbytes: Hard limit of what is kept of other instances' inventories. 256 MiB are 19 million chunks.
        disk_limit_nbytes: Hard limit of LocalDiskBackend, pages counted whole; 0 to have no such location.
        timers_of: How long membership waits, for the number of members that there are.
    """

    instance: InstanceId
    generation: Generation
    cluster: InstanceId
    ws: Address
    http: str
    transfer: Address | None
    handoff: HandoffAddress | None
    zone: str
    chunk_size: int
    cpu_limit_nbytes: int
    descriptor_limit: int
    move_deadline_s: float
    lease_s: float
    leave_s: float
    peer_fetch: bool
    wall_offset_s: float
    log_changes: int = LOG_CHANGES
    views_nbytes: int = 256 * 2**20
    disk_limit_nbytes: int = 0
    timers_of: TimersOf = lan

"""Room and bytes for a target's moves: promise room, fetch batch by batch, keep what came out of sight until it is owned.

Room for all that is missing is promised before a byte moves. Eviction happens batch by batch, and only of what is colder than
what comes. What was fetched is `Incoming` and verified: counted, but nobody's, until it is owned or dropped.
"""

from p2pkv.core.chunks import Chunk
from p2pkv.core.config import MachineConfig
from p2pkv.core.effects import FetchChunks
from p2pkv.core.events import FetchEnded, RouteRefused
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import Address, Location
from p2pkv.core.membership import Membership
from p2pkv.core.moves.target_move import TargetMove
from p2pkv.core.moves.tcp_rate import TcpRate
from p2pkv.core.outbox import Outbox
from p2pkv.core.records import HandoffAddress, Lane, MemberRecord, Operation, Route, WithinInstance
from p2pkv.core.residency import NO_ROOM, Incoming, Outgoing, Residencies, Residency, Room, room_of
from p2pkv.errors import ErrorCode, Failure

HANDOFF_BATCH = Room(nbytes=2**40, descriptors=240)
"""A message carries at most 253 descriptors (`man 7 unix`, SCM_MAX_FD); bytes cost nothing."""
TCP_BATCH = Room(nbytes=2**29, descriptors=240)
"""An eighth to half of a second, after which the source hears how far it has got; its lanes are opened anew, which takes some
5 ms. A single chunk may be larger."""

DISK_BATCH = Room(nbytes=2**26, descriptors=240)
"""Where a disk is at either end: what a lane brings for one waits in memory, beside its limit, until it is written; and a disk
takes a tenth of a second for it, after which the source hears how far it has got. A single chunk may be larger."""
_LANES: dict[type[Route], Lane] = {WithinInstance: Lane.LOCAL, HandoffAddress: Lane.HANDOFF, Address: Lane.TCP}


def _batch_limit(move: TargetMove) -> Room:
    if Location.LOCAL_DISK in (move.offer.old_position.location, move.offer.new_position.location):
        return DISK_BATCH
    return HANDOFF_BATCH if move.routes and isinstance(move.routes[0], HandoffAddress) else TCP_BATCH


def routes_between(source: MemberRecord, target: MemberRecord, old_location: Location) -> list[Route]:
    """Without a lane where both ends are one instance, by handoff where they are on one host, else over TCP."""
    if source.instance == target.instance:
        return [WithinInstance(old_location)]
    theirs, mine = source.handoff, target.handoff
    is_same_host = mine is not None and theirs is not None and mine.host_id == theirs.host_id
    routes = (theirs if is_same_host else None, source.transfer)
    return [route for route in routes if route is not None]


def is_held(residency: Residency) -> bool:
    """Whether a target has a chunk: owned and not on its way out, or verified, whichever move brought it."""
    return residency.slot is None or (isinstance(residency.slot, Incoming) and residency.slot.is_verified)


class Fetching:
    """Promises, fetches and keeps bytes for moves."""

    def __init__(self, config: MachineConfig, holdings: Holdings, membership: Membership, outbox: Outbox) -> None:
        self._me = config.instance
        self._holdings = holdings
        self._membership = membership
        self._outbox = outbox
        self.tcp_rate = TcpRate()

    def book(self, move: TargetMove) -> Residencies:
        """The book of the move's new position."""
        return self._holdings.books[move.offer.new_position.location]

    def promise(self, move: TargetMove, now: float) -> Failure | None:
        """Promise room for all that is missing, and lease what is here; the failure says why there is none."""
        book = self.book(move)
        move.pending = [chunk for chunk in move.manifest.values() if self._must_fetch(move, chunk)]
        need = sum((book.room_of(chunk) for chunk in move.pending), NO_ROOM)
        if not self._holdings.can_make_room(book, need, now=now, colder_than=now - move.offer.idle_s):
            self.release_leases(move)
            return self._no_room(need, book, now)
        source = self._membership.record_of(move.source)
        move.routes = [] if source is None else routes_between(source, self._membership.me, move.offer.old_position.location)
        book.promised[move.event_id] = need
        return None

    def _must_fetch(self, move: TargetMove, chunk: Chunk) -> bool:
        """Whether a chunk is to be fetched. One that is here is leased; one that another move is fetching is awaited.

        What is on its way out counts as here for a move, whose Take finds out.
        """
        residency = self.book(move).get(chunk.key)
        if residency is None:
            return True
        is_leaving = isinstance(residency.slot, Outgoing) and move.offer.operation is Operation.MOVE
        if is_held(residency) or is_leaving:
            residency.leases[move.event_id] = move.deadline
            move.present[chunk.key] = None
        elif isinstance(residency.slot, Incoming):
            move.awaited[chunk.key] = chunk
        return False

    def look_again(self, move: TargetMove) -> None:
        """What became of the chunks that a move awaits: they are here, to be fetched after all, or still awaited."""
        awaited, move.awaited = move.awaited, {}
        missing = {chunk.key for chunk in awaited.values() if self._must_fetch(move, chunk)}
        if missing:
            missing.update(chunk.key for chunk in move.pending)
            move.pending = [chunk for chunk in move.manifest.values() if chunk.key in missing]  # prefix first, as ever

    def miss(self, move: TargetMove) -> bool:
        """Whether anything that a move had here has gone meanwhile, to another instance; it is to be fetched again."""
        book = self.book(move)
        gone = [key for key in (*move.fetched, *move.present) if (held := book.get(key)) is None or not is_held(held)]
        for key in gone:
            move.fetched.pop(key, None)
            move.present.pop(key, None)
            move.awaited[key] = move.manifest[key]
        self.look_again(move)
        return bool(gone)

    def _no_room(self, need: Room, book: Residencies, now: float) -> Failure:
        detail = (
            f"{book.location.value} of {self._me!r} has no room for {need.nbytes} bytes in {need.descriptors} shards: "
            f"{book.fullness(now)}, and too little of that is colder than what would come."
        )
        return Failure(ErrorCode.STORE_FULL, detail)

    def fetch_next(self, move: TargetMove, now: float) -> bool:
        """Fetch the next batch; False when there is nothing (more) to fetch, `move.problem` saying why if that is a failure."""
        assert not move.is_fetching, "a move has one fetch at a time"
        self.look_again(move)
        book = self.book(move)
        batch, need = self._next_batch(move)
        book.promised.pop(move.event_id, None)  # room is made for this batch, not yet for the rest
        if not batch:
            return False
        if not move.routes:
            detail = f"{move.source!r} offers no way to its chunks that {self._me!r} can use."
            move.problem = move.problem or Failure(ErrorCode.TRANSFER_FAILED, detail)
        elif not self._holdings.make_room(book, need, now=now, colder_than=now - move.offer.idle_s):
            move.problem = self._no_room(need, book, now)
        else:
            for chunk in batch:
                book.enter(chunk, Incoming(move.event_id), now)
            book.promised[move.event_id] = sum((book.room_of(chunk) for chunk in move.pending), NO_ROOM)
            move.batch, move.batch_at = tuple(batch), now
            fetch = FetchChunks(
                event_id=move.event_id,
                source=move.source,
                route=move.routes[0],
                ticket=move.offer.ticket,
                chunks=move.batch,
                location=book.location,
                namespaces=tuple(move.namespaces.values()),
            )
            self._outbox.add(fetch)
            return True
        move.pending.clear()
        return False

    def _next_batch(self, move: TargetMove) -> tuple[list[Chunk], Room]:
        batch: list[Chunk] = []
        book, limit = self.book(move), _batch_limit(move)
        passing = need = NO_ROOM  # what passes through memory, and what it takes up in the end
        while move.pending and (not batch or (passing + room_of(move.pending[0], Location.LOCAL_CPU)).fits(limit)):
            chunk = move.pending.pop(0)
            if self._must_fetch(move, chunk):
                batch.append(chunk)
                passing += room_of(chunk, Location.LOCAL_CPU)
                need += book.room_of(chunk)
        return batch, need

    def ended(self, move: TargetMove, event: FetchEnded, now: float) -> None:
        """A fetch is over: what came is verified and staged, what didn't is struck out."""
        move.batch, nbytes_before = (), move.nbytes
        fetched = dict.fromkeys(event.fetched)
        for residency in self._incoming(move, is_verified=False):
            chunk = residency.chunk
            if chunk.key in fetched:
                residency.slot = Incoming(move.event_id, is_verified=True)
                residency.leases[move.event_id] = move.deadline
                move.fetched[chunk.key] = None
                move.nbytes += sum(chunk.shard_nbytes)
            else:
                self.book(move).remove(residency)
        if event.fetched:
            move.lane = _LANES[type(move.routes[0])]
        if move.lane is Lane.TCP:
            self.tcp_rate.learn(move.nbytes - nbytes_before, now - move.batch_at, now)
        if event.failure is not None:
            move.problem = event.failure
            move.pending.clear()

    def refused(self, move: TargetMove, event: RouteRefused) -> None:
        """The route can't be used: what was to come by it is still to be fetched, by the next one."""
        for residency in self._incoming(move, is_verified=False):
            self.book(move).remove(residency)
        move.pending[:0] = move.batch
        move.batch = ()
        move.routes.pop(0)
        move.problem = event.failure if not move.routes else None

    def own_fetched(self, move: TargetMove, now: float) -> None:
        """Own all that was fetched, for this move or another, and isn't owned yet.

        Suffixes first, so that prefixes are the last to be evicted.
        """
        for key in reversed(move.manifest):
            residency = self.book(move).get(key)
            if residency is not None:
                self.own_verified(move, residency, now)

    def own_verified(self, move: TargetMove, residency: Residency, now: float) -> None:
        """Own a chunk of a move's, if its bytes are verified and nobody's: it doesn't matter which move brought them."""
        if isinstance(residency.slot, Incoming) and residency.slot.is_verified:
            self._holdings.own_staged(self.book(move), residency, stage=residency.slot.move, now=now)

    def drop_fetched(self, move: TargetMove, now: float) -> None:
        """Free all that was fetched and isn't owned. What another move counts on is owned instead: at worst, a duplicate."""
        for residency in reversed(self._incoming(move, is_verified=True)):
            if residency.leases.keys() <= {move.event_id}:
                self._holdings.drop_staged(self.book(move), residency, stage=move.event_id)
            else:
                self.own_verified(move, residency, now)

    def release_leases(self, move: TargetMove) -> None:
        """The move needs neither room nor what was here before."""
        book = self.book(move)
        book.promised.pop(move.event_id, None)
        for key in move.manifest:
            residency = book.get(key)
            if residency is not None:
                residency.leases.pop(move.event_id, None)

    def _incoming(self, move: TargetMove, *, is_verified: bool) -> list[Residency]:
        slot = Incoming(move.event_id, is_verified)
        found = (self.book(move).get(key) for key in move.manifest)
        return [residency for residency in found if residency is not None and residency.slot == slot]

"""What goes from node to node about inventories: one's own changes and status out, the others' into their views.

A view whose owner's words don't add up is fetched anew, ever more seldom, and told of (`InventoryDoubted`). All views together
have a budget of memory; beyond it the largest is given up for a while, and lookups say that they may be incomplete. A dead
member's view is kept as long as the member is remembered: who comes back in the same boot has only missed some changes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf

from p2pkv.core.catch_up import CatchUps
from p2pkv.core.directory import Directory, Held, PromptFingerprints, prefixes_in
from p2pkv.core.effects import InventoryDoubted
from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import InstanceId
from p2pkv.core.inventory import VIEW_ENTRIES, InventoryView
from p2pkv.core.membership import Membership
from p2pkv.core.messages import (
    InventoryDelta,
    InventoryDigest,
    InventoryMessage,
    InventoryPage,
    InventoryRequest,
    RangeRequest,
    Status,
)
from p2pkv.core.outbox import Outbox
from p2pkv.core.rows import ROW_NBYTES, InventoryEntry, entries_in

STATUS_S = 1.0
"""Each second every peer gets one's own record and how far one's inventory has got."""
FLUSH_S = 0.02
"""Inventory changes of this long go out together: far below the 2 s by which all lookups agree."""
ASK_AGAIN_S = 0.5
"""What a gap asks for comes in a round trip, or waits for the owner's budget: meanwhile nothing is asked twice."""
DOUBT_S, DOUBT_MAX_S = 1.0, 64.0
"""A view that is wrong is fetched anew after this; after twice as long each time that it is wrong again, up to the greatest."""
REST_S = 60.0
"""So long a view that was given up isn't tried again."""


@dataclass(slots=True)
class _Known:
    """A view, and how far to trust it.

    Attributes:
        view: The inventory, as its owner tells it.
        asked_until: What was asked for may still come until then.
        may_digest: A digest may be an answer.
        doubt_s: How long nothing is asked after the view is found to be wrong the next time.
        rests_until: Until then nothing is asked; of a view that was given up, nothing is taken either.
        is_given_up: There is no room for it.
        has_begun: Its owner has answered once.
    """

    view: InventoryView
    asked_until: float = -inf
    may_digest: bool = False
    doubt_s: float = DOUBT_S
    rests_until: float = -inf
    is_given_up: bool = False
    has_begun: bool = False


class Gossip:
    """One's own inventory on its way to the others, and the views of theirs."""

    def __init__(self, holdings: Holdings, membership: Membership, outbox: Outbox, views_nbytes: int, now: float) -> None:
        self.directory = Directory()
        self._holdings = holdings
        self._membership = membership
        self._outbox = outbox
        self._catch_ups = CatchUps(holdings.inventory, outbox, self._flush)
        self._known: dict[InstanceId, _Known] = {}
        self._rows_max = views_nbytes // ROW_NBYTES
        self._sent_sequence = 0
        self._status_at = now
        self._flush_at = inf

    # --- questions --------------------------------------------------------------------------------------------------------

    def longest_prefixes(self, prompts: Sequence[PromptFingerprints], instances: Collection[InstanceId]) -> tuple[Held, ...]:
        """The longest prefix of a prompt, given in several namespaces, at each position that holds any of it."""
        found = self.directory.longest_prefixes(prompts, instances)
        me = self._membership.me.instance
        if me in instances:
            found += prefixes_in(self._holdings.inventory.entries, me, prompts)
        return tuple(sorted(found, key=lambda each: (each.instance, each.location)))

    def is_complete(self, instances: Collection[InstanceId]) -> bool:
        """Whether all that these instances hold is in view, but for what is on its way."""
        known = [self._known.get(each) for each in instances if each != self._membership.me.instance]
        return all(each is not None and each.has_begun and each.view.is_whole and not each.is_given_up for each in known)

    def entries_of(self, instance: InstanceId) -> list[InventoryEntry]:
        """What an instance holds, as far as is known; nothing for one that isn't known."""
        if instance == self._membership.me.instance:
            return list(self._holdings.inventory.entries)
        if instance not in self._known:
            return []
        return entries_in(*self.directory.rows.of(self.directory.holder(instance)))

    # --- the others' ------------------------------------------------------------------------------------------------------

    def joined(self, instance: InstanceId, now: float) -> None:
        """An instance is linked: catch up with its inventory."""
        record = self._membership.record_of(instance)
        known = self._known.get(instance)
        if record is not None and (known is None or known.view.generation != record.generation):
            if known is not None:
                self.directory.clear(instance)
            known = self._known[instance] = _Known(self._fresh(instance, record.generation))
        if known is not None and not known.is_given_up:
            self._ask(instance, known, now)

    def _fresh(self, instance: InstanceId, generation: int) -> InventoryView:
        return InventoryView(generation, self.directory.rows, self.directory.holder(instance))

    def _ask(self, instance: InstanceId, known: _Known, now: float) -> None:
        known.asked_until, known.may_digest = now + ASK_AGAIN_S, True
        self._outbox.send(instance, known.view.request())

    def _ask_range(self, instance: InstanceId, known: _Known, now: float) -> None:
        known.asked_until = now + ASK_AGAIN_S
        self._outbox.send(instance, known.view.range_request())

    def status(self, sender: InstanceId, status: Status, now: float) -> None:
        """How far the sender's inventory has got."""
        known = self._known.get(sender)
        if known is None or now < known.rests_until:
            return
        if known.is_given_up:
            if self._has_room(status.entry_count):
                known.is_given_up, known.has_begun = False, False
                self._ask(sender, known, now)
        elif known.view.is_refuted(status):
            known.rests_until = now + known.doubt_s
            known.doubt_s = min(2 * known.doubt_s, DOUBT_MAX_S)
            known.view.awaits_digest = True
            self._outbox.add(InventoryDoubted(sender, "its inventory isn't what its changes add up to"))
            self._ask(sender, known, now)
        elif now < known.asked_until:
            pass
        elif known.view.lags(status):
            self._ask(sender, known, now)
        elif known.view.missing:
            self._ask_range(sender, known, now)
        elif status.sequence == known.view.sequence:
            known.has_begun = True
            known.doubt_s = DOUBT_S

    def receive(self, sender: InstanceId, message: InventoryMessage, now: float) -> None:
        """The sender's inventory, or a question about one's own."""
        if isinstance(message, InventoryRequest | RangeRequest):
            self._catch_ups.ask(sender, message, now)
            return
        known = self._known.get(sender)
        if known is None or known.is_given_up:
            return
        match message:
            case InventoryDelta():
                self._delta(sender, known, message, now)
            case InventoryDigest():
                self._digest(sender, known, message, now)
            case InventoryPage():
                if known.view.apply_page(message) and known.view.missing:
                    self._ask_range(sender, known, now)
        self._keep_in_bounds(sender, known, now)

    def _delta(self, sender: InstanceId, known: _Known, delta: InventoryDelta, now: float) -> None:
        if known.view.apply_delta(delta):
            known.has_begun, known.asked_until = True, -inf
        elif now >= known.asked_until and now >= known.rests_until:
            self._ask(sender, known, now)

    def _digest(self, sender: InstanceId, known: _Known, digest: InventoryDigest, now: float) -> None:
        """What is different, when the log says it no longer. Comparing is work: an answer is taken once."""
        if known.may_digest:
            known.may_digest = False
            known.view.compare(digest)
            known.has_begun = True
            if known.view.missing:
                self._ask_range(sender, known, now)

    # --- bounds -----------------------------------------------------------------------------------------------------------

    def _has_room(self, entry_count: int) -> bool:
        return entry_count <= VIEW_ENTRIES and len(self.directory.rows) + entry_count <= self._rows_max

    def _keep_in_bounds(self, sender: InstanceId, known: _Known, now: float) -> None:
        if known.view.entry_count > VIEW_ENTRIES:
            self._give_up(sender, f"it says that it holds more than {VIEW_ENTRIES} chunks", now)
        while len(self.directory.rows) > self._rows_max:
            largest = max(
                self._known, key=lambda each: (not self._known[each].is_given_up, self._known[each].view.entry_count, each)
            )
            if self._known[largest].is_given_up:
                return
            self._give_up(largest, "all inventories together take more memory than they may, and its is the largest", now)

    def _give_up(self, instance: InstanceId, reason: str, now: float) -> None:
        known = self._known[instance]
        self.directory.clear(instance)
        known.view = self._fresh(instance, known.view.generation)
        known.is_given_up, known.rests_until = True, now + REST_S
        self._outbox.add(InventoryDoubted(instance, reason))

    # --- one's own --------------------------------------------------------------------------------------------------------

    def follow(self, now: float) -> None:
        """After each event: changes go out soon, a new namespace at once."""
        if self._holdings.inventory.sequence != self._sent_sequence and self._flush_at == inf:
            self._flush_at = now + FLUSH_S
        if len(self._holdings.namespaces) != len(self._membership.me.namespaces):
            self._send_status()

    def describe(self) -> None:
        """Bring one's own record up to date."""
        self._membership.describe(tuple(self._holdings.namespaces.values()), self._holdings.statuses())

    def wakeup_at(self) -> float:
        """When `wake` has something to do."""
        return min(self._status_at, self._flush_at, self._catch_ups.wakeup_at())

    def wake(self, now: float) -> None:
        """Send what is due."""
        if now >= self._flush_at:
            self._flush()
        if now >= self._status_at:
            self._status_at = now + STATUS_S
            self._send_status()
        self._catch_ups.wake(now)

    def _flush(self) -> None:
        """Send all changes to all. More of them than the log has are left to the next status, and to who asks then."""
        self._flush_at = inf
        inventory = self._holdings.inventory
        for part in inventory.tail(inventory.generation, self._sent_sequence) or ():
            for instance in self._membership.linked():
                self._outbox.send(instance, part)
        self._sent_sequence = inventory.sequence

    def _send_status(self) -> None:
        self.describe()
        for instance in [each for each in self._known if self._membership.record_of(each) is None]:
            del self._known[instance]
            self.directory.forget(instance)
        inventory = self._holdings.inventory
        status = Status(
            me=self._membership.me,
            sequence=inventory.sequence,
            entry_count=len(inventory.entries),
            entry_sum=inventory.entries.sum,
        )
        for instance in self._membership.linked():
            self._outbox.send(instance, status)

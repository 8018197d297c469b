"""What goes from node to node about inventories: one's own changes and status out, the others' into their views."""

from collections.abc import Callable
from math import inf

from p2pkv.core.holdings import Holdings
from p2pkv.core.ids import InstanceId
from p2pkv.core.inventory import EntrySet, InventoryView
from p2pkv.core.membership import Membership
from p2pkv.core.messages import InventoryDelta, InventoryPage, InventoryRequest, Status
from p2pkv.core.outbox import Outbox

STATUS_S = 1.0
"""Each second every peer gets one's own record and how far one's inventory has got."""
FLUSH_S = 0.02
"""Inventory changes of this long go out together: far below the 2 s by which all lookups agree."""


class Gossip:
    """One's own inventory on its way to the others, and the views of theirs."""

    def __init__(self, holdings: Holdings, membership: Membership, outbox: Outbox, now: float) -> None:
        self._holdings = holdings
        self._membership = membership
        self._outbox = outbox
        self._views: dict[InstanceId, InventoryView] = {}
        self._sent_sequence = 0
        self._status_at = now
        self._flush_at = inf

    def entries_of(self, instance: InstanceId) -> EntrySet | None:
        """What an instance holds, as far as is known; None for one that isn't known."""
        if instance == self._membership.me.instance:
            return self._holdings.inventory.entries
        view = self._views.get(instance)
        return None if view is None else view.entries

    # --- the others' ------------------------------------------------------------------------------------------------------

    def joined(self, instance: InstanceId) -> None:
        """An instance is linked: catch up with its inventory."""
        record = self._membership.record_of(instance)
        view = self._views.get(instance)
        if record is not None and (view is None or view.generation != record.generation):
            self._views[instance] = view = InventoryView(record.generation)
        if view is not None:
            self._outbox.send(instance, view.request())

    def status(self, sender: InstanceId, status: Status) -> None:
        """How far the sender's inventory has got."""
        self._catch_up(sender, lambda view: view.lags(status))

    def delta(self, sender: InstanceId, delta: InventoryDelta) -> None:
        """The sender's inventory has changed."""
        self._catch_up(sender, lambda view: None if view.apply_delta(delta) else view.request())

    def page(self, sender: InstanceId, page: InventoryPage) -> None:
        """A page of all that the sender holds."""
        if sender in self._views:
            self._views[sender].apply_page(page)

    def _catch_up(self, sender: InstanceId, step: Callable[[InventoryView], InventoryRequest | None]) -> None:
        view = self._views.get(sender)
        if view is not None and (request := step(view)) is not None:
            self._outbox.send(sender, request)

    # --- one's own --------------------------------------------------------------------------------------------------------

    def requested(self, sender: InstanceId, request: InventoryRequest) -> None:
        """The sender lacks a part of one's own inventory."""
        for part in self._holdings.inventory.since(request.generation, request.sequence):
            self._outbox.send(sender, part)

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
        return min(self._status_at, self._flush_at)

    def wake(self, now: float) -> None:
        """Send what is due."""
        if now >= self._flush_at:
            self._flush()
        if now >= self._status_at:
            self._status_at = now + STATUS_S
            self._send_status()

    def _flush(self) -> None:
        self._flush_at = inf
        inventory = self._holdings.inventory
        for part in inventory.since(inventory.generation, self._sent_sequence):
            for instance in self._membership.linked():
                self._outbox.send(instance, part)
        self._sent_sequence = inventory.sequence

    def _send_status(self) -> None:
        self.describe()
        self._views = {name: view for name, view in self._views.items() if self._membership.record_of(name) is not None}
        inventory = self._holdings.inventory
        status = Status(
            me=self._membership.me,
            sequence=inventory.sequence,
            entry_count=len(inventory.entries),
            entry_sum=inventory.entries.sum,
        )
        for instance in self._membership.linked():
            self._outbox.send(instance, status)

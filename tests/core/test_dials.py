"""Whom to dial, and when: contacts for ever, hearsay a few times, nobody too often."""

from random import Random

import pytest

from p2pkv.core.dials import DIALS_MAX, FIRST_RETRY_S, JITTER_S, LAST_RETRY_S, LEARNED_TRIES, Dials
from p2pkv.core.effects import OpenLink
from p2pkv.core.ids import Address
from p2pkv.core.outbox import Outbox
from tests.core.builders import address_of

PEER = address_of("peer")


class Phone:
    """Dials, and their clock."""

    def __init__(self) -> None:
        self.outbox = Outbox("me")
        self.dials = Dials(self.outbox, Random("phone"), address_of("me"))
        self.now = 0.0

    def add(self, address: Address, *, is_contact: bool = True) -> None:
        self.dials.add(address, is_contact=is_contact, now=self.now)

    def until_next(self) -> float:
        """How long until the next dial; it is made then, and `dialed` names it."""
        waited = self.dials.wakeup_at() - self.now
        self.now = max(self.now, self.dials.wakeup_at())
        self.dials.wake(self.now)
        return waited

    def dialed(self) -> list[Address]:
        return [effect.address for effect in self.outbox.take_effects() if isinstance(effect, OpenLink)]


def test_an_address_is_dialed_once_until_that_dial_has_ended() -> None:
    phone = Phone()
    phone.add(PEER)
    phone.add(PEER)
    phone.dials.wake(0.0)
    phone.dials.wake(100.0)
    assert phone.dialed() == [PEER]
    assert phone.dials.wakeup_at() == float("inf")


@pytest.mark.parametrize("tries", [8, 2000])
def test_a_contact_is_dialed_for_ever_ever_more_seldom(tries: int) -> None:
    phone = Phone()
    phone.add(PEER)
    waits = []
    for _ in range(tries):
        waits.append(phone.until_next())
        phone.dials.failed(PEER, phone.now)
    assert phone.dialed() == [PEER] * tries
    for wait, floor in zip(waits[1:], [0.1, 0.3, 0.9, 2.7, *[LAST_RETRY_S] * tries], strict=False):
        assert floor <= wait <= floor + JITTER_S + 1e-9


def test_hearsay_is_forgotten_after_a_few_failures() -> None:
    phone = Phone()
    phone.add(PEER, is_contact=False)
    for _ in range(LEARNED_TRIES):
        phone.until_next()
        phone.dials.failed(PEER, phone.now)
    assert phone.dials.wakeup_at() == float("inf")
    phone.dials.failed(PEER, phone.now)
    phone.dials.closed(PEER, phone.now)
    assert phone.dials.wakeup_at() == float("inf")


def test_who_was_reached_once_is_dialed_on() -> None:
    phone = Phone()
    phone.add(PEER, is_contact=False)
    phone.dials.reached(PEER, "peer")
    for _ in range(LEARNED_TRIES + 1):
        phone.until_next()
        phone.dials.failed(PEER, phone.now)
    assert phone.dials.wakeup_at() < float("inf")
    phone.dials.forget(PEER)
    assert phone.dials.wakeup_at() == float("inf")


def test_a_contact_is_never_forgotten() -> None:
    phone = Phone()
    phone.add(PEER, is_contact=False)
    phone.add(PEER)
    phone.dials.forget(PEER)
    assert phone.until_next() == 0.0


def test_a_linked_instance_is_not_dialed_by_whatever_address() -> None:
    phone = Phone()
    alias = Address("alias", 1)
    phone.add(PEER)
    phone.add(alias)
    phone.dials.reached(PEER, "peer")
    phone.dials.reached(alias, "peer")
    phone.outbox.links["peer"] = 7
    assert phone.dials.wakeup_at() == float("inf")
    del phone.outbox.links["peer"]
    phone.dials.wake(0.0)
    assert phone.dialed() == [PEER, alias]


def test_a_closed_link_is_redialed_at_once() -> None:
    phone = Phone()
    phone.add(PEER)
    phone.until_next()
    phone.dials.closed(PEER, phone.now)
    assert phone.until_next() <= JITTER_S < FIRST_RETRY_S


def test_ones_own_addresses_are_not_dialed() -> None:
    phone = Phone()
    alias = Address("alias", 1)
    phone.add(address_of("me"))
    phone.add(alias)
    phone.dials.is_own(alias)
    phone.add(alias)
    assert phone.dials.wakeup_at() == float("inf")


def test_there_is_a_limit_to_what_is_learned() -> None:
    phone = Phone()
    for port in range(1, DIALS_MAX + 10):
        phone.add(Address("many", port), is_contact=False)
    phone.dials.wake(0.0)
    assert len(phone.dialed()) == DIALS_MAX

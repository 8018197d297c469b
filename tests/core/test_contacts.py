"""Whom a node dials on, and whom it forgets."""

from random import Random

import pytest

from p2pkv.core.dials import LEARNED_TRIES, Dials
from p2pkv.core.effects import OpenLink
from p2pkv.core.ids import Address
from p2pkv.core.outbox import Outbox

OWN, FIRST, SECOND = (Address("10.0.0.1", port) for port in (1, 2, 3))


class Dialing:
    """Dials whose every attempt fails."""

    def __init__(self) -> None:
        self._outbox = Outbox("me")
        self.dials = Dials(self._outbox, Random("dials"), OWN)
        self._now = 0.0

    def contacts_are(self, *addresses: Address) -> None:
        self.dials.contacts_are(addresses, self._now)

    def dialed_in(self, seconds: float) -> list[Address]:
        """Whom it dials in the next so many seconds."""
        dialed, until = [], self._now + seconds
        while (due_at := self.dials.wakeup_at()) <= until:
            self._now = max(due_at, self._now)
            self.dials.wake(self._now)
            for effect in self._outbox.take_effects():
                assert isinstance(effect, OpenLink)
                dialed.append(effect.address)
                self.dials.failed(effect.address, self._now)
        self._now = until
        return dialed


@pytest.fixture
def dialing() -> Dialing:
    return Dialing()


def test_contacts_are_dialed_as_long_as_it_takes(dialing: Dialing) -> None:
    dialing.contacts_are(FIRST, OWN)
    dialing.dialed_in(600)
    assert set(dialing.dialed_in(6)) == {FIRST}


def test_who_is_no_contact_any_more_is_forgotten_after_some_failures(dialing: Dialing) -> None:
    dialing.contacts_are(FIRST)
    dialing.dialed_in(60)
    dialing.contacts_are(SECOND)
    assert FIRST in dialing.dialed_in(6)
    assert set(dialing.dialed_in(60)) == {SECOND}


def test_who_becomes_a_contact_again_is_dialed_on(dialing: Dialing) -> None:
    dialing.contacts_are(FIRST)
    dialing.contacts_are()
    dialing.contacts_are(FIRST)
    assert len(dialing.dialed_in(60)) > LEARNED_TRIES

"""Mutants of what decides who lives; `mutants` lists them with all others."""

from dataclasses import replace

from p2pkv.core.health import LocalHealth
from p2pkv.core.ids import InstanceId
from p2pkv.core.liveness import Liveness
from p2pkv.core.messages import Rumour
from p2pkv.core.suspicion import Suspicion
from sims.mutant import Method


def refutes_nothing(_right: Method) -> Method:
    """An instance lets others suspect it."""

    def told_of_me(_self: Liveness, _sender: InstanceId, _rumour: Rumour) -> None:
        return

    return told_of_me


def counts_no_confirmations(_right: Method) -> Method:
    """A suspicion lasts as long whoever shares it."""

    def confirm(_self: Suspicion, _origin: InstanceId) -> bool:
        return False

    return confirm


def feels_always_well(_right: Method) -> Method:
    """An instance blames others for its own slowness."""

    def add(_self: LocalHealth, _points: int) -> None:
        return

    return add


def confuses_boots(right: Method) -> Method:
    """What is said of one boot of an instance counts for any other."""

    def told(self: Liveness, sender: InstanceId, rumour: Rumour, now: float) -> None:
        member = self._roster.members.get(rumour.instance)
        generation = rumour.generation if member is None else member.record.generation
        right(self, sender, replace(rumour, generation=generation), now)

    return told

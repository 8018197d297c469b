"""A core with one rule broken, for as long as a test wants it so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

Method = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A core that breaks one rule.

    Attributes:
        rule: Number of the rule in `docs/protocol.md`.
        scenario: Which is known to catch it.
        owner: Where the method is.
        method: Its name.
        wrong: Makes the wrong method, given the right one.
        kind: Of the exhaustive search of the hand-over, which catches it too; None where that can't tell.
        early: How often a time must be over too soon there.
    """

    rule: str
    scenario: str
    owner: type | ModuleType
    method: str
    wrong: Callable[[Method], Method]
    kind: str | None = None
    early: int = 0

    @property
    def description(self) -> str:
        """What it does wrong."""
        return (self.wrong.__doc__ or "").rstrip(".")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The core is wrong meanwhile."""
        with replaced(self.owner, self.method, self.wrong):
            yield


@contextmanager
def replaced(owner: type | ModuleType, name: str, wrong: Callable[[Any], Any]) -> Iterator[None]:
    """`owner` has another method, or another constant, instead meanwhile."""
    right = getattr(owner, name)
    setattr(owner, name, wrong(right))
    try:
        yield
    finally:
        setattr(owner, name, right)

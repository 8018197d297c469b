"""Values of any type that the wire knows, drawn at random: valid, and senseless.

They are made from the annotations that the codecs validate by, so a message that is new, or changes, is drawn as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from random import Random
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Len, Lt, Predicate

MOST = 2**64 - 1
"""The largest number of msgpack."""
LETTERS = "abc019._-~/ \0é漢\U0001f980"

Pools = Mapping[str, Sequence[object]]
"""Values by the names of fields."""


@dataclass
class Bounds:
    """What a value's annotation allows."""

    low: float = -(2**63)
    high: float = MOST
    least: int = 0
    most: int = 512
    is_allowed: Callable[[Any], object] = lambda _: True

    def narrow(self, constraint: object) -> None:
        match constraint:
            case Ge(ge=low):
                self.low = max(self.low, low)  # type: ignore[call-overload]  # a number, as all bounds of the wire are
            case Gt(gt=low):
                self.low = max(self.low, low + 1)  # type: ignore[operator]
            case Le(le=high):
                self.high = min(self.high, high)  # type: ignore[call-overload]
            case Lt(lt=high):
                self.high = min(self.high, high - 1)  # type: ignore[operator]
            case Len(min_length=least, max_length=most):
                self.least, self.most = least, self.most if most is None else most
            case Predicate(func=is_allowed):
                self.is_allowed = is_allowed


class Draw:
    """Draws values.

    Args:
        rng: Decides.
        pools: Values that mean something where they are sent, by the name of their field.
        names: For texts that must fulfil a condition, as instances' names must.
        pooled: How often a field that has a pool is taken from it.
    """

    def __init__(self, rng: Random, pools: Pools, names: Sequence[str], *, pooled: float = 0.8) -> None:
        self._rng = rng
        self._pools = pools
        self._names = names
        self._pooled = pooled

    def value(self, hint: Any) -> Any:
        """A value of this type."""
        bounds = Bounds()
        while get_origin(hint) is Annotated:
            hint, *constraints = get_args(hint)
            for constraint in constraints:
                bounds.narrow(constraint)
        if get_origin(hint) in (Union, UnionType):
            return self.value(self._rng.choice(get_args(hint)))
        if get_origin(hint) is tuple:
            return self._tuple(get_args(hint), bounds)
        if is_dataclass(hint):
            assert isinstance(hint, type)
            return hint(**{name: self._field(name, each) for name, each in _fields(hint).items()})
        return self._plain(hint, bounds)

    def _field(self, name: str, hint: Any) -> Any:
        if name in self._pools and self._rng.random() < self._pooled:
            return self._rng.choice(self._pools[name])
        return self.value(hint)

    def _tuple(self, items: tuple[Any, ...], bounds: Bounds) -> tuple[Any, ...]:
        if len(items) == 2 and items[1] is Ellipsis:
            some = min(bounds.least + self._rng.randrange(4), bounds.most)
            count = min(bounds.most, 200) if self._rng.random() < 0.02 else some
            return tuple(self.value(items[0]) for _ in range(count))
        return tuple(map(self.value, items))

    def _plain(self, hint: Any, bounds: Bounds) -> Any:
        rng = self._rng
        if hint is NoneType:
            return None
        if hint is bool:
            return rng.random() < 0.5
        if hint is int:
            low, high = int(bounds.low), int(bounds.high)
            return rng.choice([low, min(low + 1, high), high, rng.randint(low, high), min(high, max(low, rng.randrange(100)))])
        if hint is float:
            return rng.choice([max(bounds.low, 0.0), min(bounds.high, 1.5), float(bounds.high), rng.uniform(0, 100)])
        if hint is bytes:
            return rng.randbytes(self._length(bounds))
        if hint is str:
            text = "".join(rng.choices(LETTERS, k=self._length(bounds)))
            return text if bounds.is_allowed(text) else rng.choice(self._names)
        assert issubclass(hint, Enum), f"there is no way yet to draw a {hint}"
        return rng.choice(list(hint))

    def _length(self, bounds: Bounds) -> int:
        length = self._rng.choice([bounds.least, bounds.least + 4 * self._rng.randrange(8), self._rng.randrange(600)])
        return min(bounds.most, max(bounds.least, length))


@cache
def _fields(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}

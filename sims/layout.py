"""Layouts as data: who is near whom. `topology/NAME.yaml` says it of the instances that `topology/NAME/` configures.

`p2pkv up topology/NAME` runs those instances on one host, where all are equally near; a scenario that says `layout: NAME` runs
instances of the same names in a virtual network, with the delays of the layout on every way.
"""

from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Self

import yaml
from annotated_types import Ge, Le, Len
from pydantic import BaseModel, ConfigDict, model_validator

from p2pkv.core.ids import InstanceId

FOLDER = Path(__file__).parents[1] / "topology"

Share = Annotated[float, Ge(0), Le(1)]
Seconds = Annotated[float, Ge(0), Le(3600)]


class Part(BaseModel):
    """What yaml says of something: nothing unknown, and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Way(Part):
    """What a message meets between two instances.

    Attributes:
        delay_s: Shortest and longest time that it takes.
        loss: Share of messages that never arrive.
    """

    delay_s: tuple[Seconds, Seconds]
    loss: Share = 0.0


class WayBetween(Way):
    """The way between two groups, in both directions."""

    groups: tuple[str, str]


class Layout(Part):
    """Instances in groups, and the ways within and between them.

    Attributes:
        description: One line for people.
        groups: Instances by group: a zone, a rack.
        within: The way between two instances of one group.
        between: The ways between groups, each pair of them once.
    """

    description: str
    groups: Annotated[dict[str, tuple[InstanceId, ...]], Len(2, 128)]
    within: Way
    between: tuple[WayBetween, ...]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        names = self.names
        if len(set(names)) < len(names) or not all(self.groups.values()):
            raise ValueError("every group needs instances, and every instance is of one group")
        wanted = sorted(tuple(sorted(pair)) for pair in combinations(self.groups, 2))
        if sorted(tuple(sorted(way.groups)) for way in self.between) != wanted:
            raise ValueError("between must name each pair of groups once")
        return self

    @property
    def names(self) -> tuple[InstanceId, ...]:
        """All instances."""
        return tuple(name for members in self.groups.values() for name in members)

    def group_of(self, name: InstanceId) -> str:
        """The group of an instance."""
        return self._group_of[name]

    def way(self, one: InstanceId, other: InstanceId) -> Way:
        """What a message between two instances meets."""
        pair = frozenset((self._group_of[one], self._group_of[other]))
        return self.within if len(pair) == 1 else self._ways[pair]

    def nearest(self, group: str) -> str:
        """The group with the shortest way to `group`; of several, the one named first."""
        others = [each for each in self.groups if each != group]
        return min(others, key=lambda each: self._ways[frozenset((group, each))].delay_s[1])

    @cached_property
    def _group_of(self) -> dict[InstanceId, str]:
        return {name: group for group, members in self.groups.items() for name in members}

    @cached_property
    def _ways(self) -> dict[frozenset[str], Way]:
        return {frozenset(way.groups): way for way in self.between}


def layout_names() -> list[str]:
    """Names of all layouts."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_layout(name: str) -> Layout:
    """Read `topology/NAME.yaml`.

    Raises:
        ValueError: There is none of that name, or its file isn't a layout.
    """
    if name not in layout_names():
        raise ValueError(f"there is no layout {name!r}; there are {', '.join(layout_names())}")
    return Layout.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))

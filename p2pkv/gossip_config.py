"""The key `gossip`: a preset of membership's timers, and which of them are other than it has them.

What each timer means, its unit, its origin and how to choose it stand at `p2pkv.core.timers.Timers`.
"""

from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from p2pkv.config_layers import number
from p2pkv.core.timers import TimersOf, lan, local, wan

PRESETS: dict[str, TimersOf] = {"lan": lan, "wan": wan, "local": local}
SIZES = (2, 32, 1024)
"""Members for which timers must agree with each other."""

Seconds = Annotated[float, BeforeValidator(number), Field(ge=0.001, le=86400, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(number), Field(ge=0.01, le=1, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(number), Field(ge=0, le=64)]
SomeCount = Annotated[int, BeforeValidator(number), Field(ge=1, le=256)]
Nbytes = Annotated[int, BeforeValidator(number), Field(ge=512, le=65536)]

_ORDERED = (
    ("probe_timeout_s", "probe_interval_s", 2.0),
    ("silence_s", "close_silent_s", 1.0),
    ("suspicion_min_s", "suspicion_max_s", 1.0),
)
"""The second is at least so many times the first."""


class GossipConfig(BaseModel):
    """`preset`, and each timer by its name in `Timers`; None is as the preset has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["lan", "wan", "local"] = "lan"
    probe_interval_s: Seconds | None = None
    probe_timeout_s: Seconds | None = None
    nack_share: Share | None = None
    indirect_count: Count | None = None
    silence_s: Seconds | None = None
    close_silent_s: Seconds | None = None
    suspicion_min_s: Seconds | None = None
    suspicion_max_s: Seconds | None = None
    confirmations: Count | None = None
    health_max: Count | None = None
    lag_s: Seconds | None = None
    gossip_interval_s: Seconds | None = None
    gossip_fanout: SomeCount | None = None
    retransmits: SomeCount | None = None
    rumours_nbytes: Nbytes | None = None
    push_pull_s: Seconds | None = None
    refusals: SomeCount | None = None
    remember_s: Seconds | None = None

    @property
    def timers_of(self) -> TimersOf:
        """The timers of a cluster of so many members."""
        preset = PRESETS[self.preset]
        changes: dict[str, Any] = self.model_dump(exclude={"preset"}, exclude_none=True)
        return cache(lambda n: replace(preset(n), **changes)) if changes else preset

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for timers in map(self.timers_of, SIZES):
            for less, more, factor in _ORDERED:
                least, most = getattr(timers, less), getattr(timers, more)
                if factor * least > most:
                    times = f"{factor:g} times " if factor != 1 else ""
                    raise ValueError(f"{more} must be at least {times}{less}: they are {most:g} and {least:g}")
        return self

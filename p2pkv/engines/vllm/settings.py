"""What a user may set in `kv_connector_extra_config`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Self

from p2pkv.errors import ConfigError

PREFIX = "p2pkv."


@dataclass(frozen=True, slots=True)
class Settings:
    """Keys of `kv_connector_extra_config`, with `p2pkv.` before each; others belong to other connectors.

    Attributes:
        model: Name under which chunks are kept, instead of vLLM's name of the model and what changes its KV. Engines that say
            the same share chunks: it is the operator's word that they may.
        lookup_deadline_s: A lookup that takes longer is a miss. Seconds; a lookup takes 1 to 10 ms.
        load_deadline_s: A load that takes longer is given up, and computed. Seconds.
        store_buffer_mib: Host memory for what is on its way to the node; what doesn't fit when the node is slow isn't stored.
            MiB a worker.
        prefill_tokens_per_s: How fast this engine computes prompts: with `peer_fetch`, a fetch over TCP that would take longer
            isn't made, and none is awaited longer. Tokens a second, 1 or more; None to let the node guess.
    """

    model: str | None = None
    lookup_deadline_s: float = 0.05
    load_deadline_s: float = 5.0
    store_buffer_mib: float = 512.0
    prefill_tokens_per_s: float | None = None

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, object]) -> Self:
        """Read the keys that are ours.

        Raises:
            ConfigError: Unknown keys or wrong values; all are listed.
        """
        known = [field.name for field in fields(cls)]
        given = {key.removeprefix(PREFIX): value for key, value in extra.items() if key.startswith(PREFIX)}
        problems = []
        for name, value in given.items():
            if name not in known:
                near = get_close_matches(name, known, n=1) or known
                problems.append(f"{PREFIX}{name}: no such key; is {PREFIX}{f' or {PREFIX}'.join(near)} meant?")
            elif name == "model" and not (isinstance(value, str) and 0 < len(value) <= 512):
                problems.append(f"{PREFIX}{name}: must be a text of 1 to 512 characters, not {value!r}")
            elif name != "model" and not (isinstance(value, int | float) and value is not True and 0 < value <= 1e6):
                problems.append(f"{PREFIX}{name}: must be a number above 0, not {value!r}")
            elif name == "prefill_tokens_per_s" and isinstance(value, int | float) and value < 1:
                problems.append(f"{PREFIX}{name}: must be 1 or more, not {value!r}")
        if problems:
            raise ConfigError("kv_connector_extra_config: " + "; ".join(problems))
        return cls(**given)  # type: ignore[arg-type]

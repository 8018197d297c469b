"""How large anything that comes from outside may be. Each number says what it is made of.

A message inside its limits can still be a lie; a message beyond them is refused before it costs memory.
"""

MIB = 2**20

MAX_MESSAGE_NBYTES = 8 * MIB
"""One message of any kind. The largest is a `PlanRequest`: 4 MiB of tokens and at most 3 MiB of identity."""

MAX_ARRAY_ITEMS = 4096
"""Of one msgpack array. The longest is a page of inventory, 2,048 entries. msgpack allocates an array at the length that its
header claims, so without this limit a few nested headers of 5 bytes would cost gigabytes."""

MAX_MAP_ITEMS = 64
"""Of one msgpack map. Every map is a dataclass; the largest has 13 fields, the rest is for those of later versions."""

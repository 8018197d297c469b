"""How `p2pkv` ends."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What scripts go by."""

    DONE = 0
    FAILED = 1
    WRONG_USAGE = 2
    NO_NODE = 3

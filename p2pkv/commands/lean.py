"""Imports for a process that is to stay small."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import cast


@contextmanager
def without_rich() -> Iterator[None]:
    """What is imported inside doesn't find rich.

    structlog would load it for tracebacks in colours, which a node's log never has: 4 MB of the 80 that a node may take.
    """
    if "rich" in sys.modules or "structlog" in sys.modules:  # too late to save anything
        yield
        return
    sys.modules["rich"] = cast("ModuleType", None)  # so Python is told that there is no such module
    try:
        yield
    finally:
        del sys.modules["rich"]

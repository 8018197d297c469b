"""What engines use. Importing it loads torch; a node never does."""

from p2pkv.core.keys import Identity
from p2pkv.engines.cache import EngineCache, Lookup
from p2pkv.engines.layout import KVLayout

__all__ = ["EngineCache", "Identity", "KVLayout", "Lookup"]

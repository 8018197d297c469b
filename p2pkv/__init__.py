"""p2pkv moves KV caches between LLM engines, peer to peer, with no controller in the middle."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pkv.config import NodeConfig as NodeConfig
    from p2pkv.node import open_node as open_node

__all__ = ["NodeConfig", "open_node"]


def __getattr__(name: str) -> Any:
    """Import what is exported when it is first asked for: `import p2pkv` alone costs nothing, and an engine loads no node."""
    if name == "NodeConfig":
        from p2pkv.config import NodeConfig

        return NodeConfig
    if name == "open_node":
        from p2pkv.node import open_node

        return open_node
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

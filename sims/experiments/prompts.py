"""What experiments store: prompts of one chunk or several, no two alike, and who has come to know of it."""

from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import TOKEN_NBYTES, TokenBytes
from sims.engine import NAMESPACE
from sims.experiments.cluster import Cluster
from sims.world import Node

CHANGE_NBYTES = 11
"""What one change of an inventory has to say: a fingerprint of 8 bytes, more or less and where in one, tokens in two."""


def prompt(number: int, chunks: int = 1) -> TokenBytes:
    """The prompt of that number, of so many full chunks."""
    return number.to_bytes(TOKEN_NBYTES, "little") * (chunks * NAMESPACE.chunk_size)


def store(cluster: Cluster, owner: InstanceId, number: int, chunks: int = 1) -> None:
    """Let an engine store a prompt."""
    cluster.engines[owner].store(prompt(number, chunks))


def held_count(node: Node, owner: InstanceId) -> int:
    """How many chunks a node thinks that `owner` holds."""
    return len(node.machine.inventory_of(owner))

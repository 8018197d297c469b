"""`p2pkv node`: one instance's node, from its ready line to the signal that ends it."""

import gc
import signal

import trio
import typer

from p2pkv.config import NodeConfig
from p2pkv.node import Node, open_node


async def run_node(config: NodeConfig) -> None:
    """Run a node until SIGTERM or SIGINT; then it leaves the cluster.

    Raises:
        ConfigError: It can't start on this host.
        InstanceIdInUseError: A living node has its name.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_node(config) as node:
            gc.freeze()  # else the collector looks through all that was imported, 20 ms each time
            typer.echo(ready_line(node))
            await anext(signals)


def ready_line(node: Node) -> str:
    """What `p2pkv node` prints when it is ready; programs read it."""
    where = node.addresses
    return (
        f"p2pkv ready instance={node.config.lmcache_instance_id} http={where.http} ws=ws://{where.ws} "
        f"transfer={where.transfer} shared={where.shared or '-'}"
    )

"""Serving the reference engine: the model and its cache set up, its calls on Hypercorn's trio worker, on loopback only."""

import gc
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import trio
import typer

from p2pkv.config import NodeConfig, is_loopback
from p2pkv.core.ids import Address
from p2pkv.engines import EngineCache
from p2pkv.engines.huggingface import layout_of
from p2pkv.engines.reference.engine import ReferenceEngine
from p2pkv.engines.reference.front import EngineFront, build_app
from p2pkv.engines.reference.guard import DoorGuard
from p2pkv.engines.reference.model import ReferenceModel, load_model, make_tiny_llama
from p2pkv.errors import ConfigError, UnsupportedCacheError
from p2pkv.http_server import config_for, serve

UNREAD_LIMIT_MS = 1000
"""A client that takes nothing of its answer for so long is cut off: Hypercorn waits for it even when it is cancelled."""


async def serve_engine(
    config: Path | NodeConfig,
    *,
    port: int,
    host: str = "127.0.0.1",
    model_directory: Path | None = None,
    served_model_names: Sequence[str] = (),
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve one engine until cancelled.

    Its node is started if none runs, and outlives it. When requests are taken, one line on stdout says so. A completion that is
    being computed at a cancellation ends at its next token.

    Args:
        config: The instance's yaml, or what was read from it. Only with a file can a node be started.
        port: To listen on; 0 for any free one.
        host: A loopback address.
        model_directory: Of the model to run; None for the tiny Llama.
        served_model_names: Names beside the model's own by which requests may ask for it.
        task_status: Told the URL when requests are taken.

    Raises:
        ConfigError: The address can't be had, there is no such model, or the configuration has problems.
        NodeUnreachableError: No node runs, and none could be started.
        FailureError: The node refuses the engine.
    """
    node = config if isinstance(config, NodeConfig) else NodeConfig.from_yaml(config)
    with _bind(host, port) as listener:
        port = listener.getsockname()[1]
        url = f"http://{Address(host, port)}"
        model, cache, problem = await trio.to_thread.run_sync(partial(_set_up, config, model_directory), abandon_on_cancel=True)
        gc.freeze()  # else the interpreter spends 1.5 s at its end on collecting torch's objects
        with cache or nullcontext():
            front = EngineFront(ReferenceEngine(model, cache, problem), served_model_names)
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_front, front, listener)
                typer.echo(f"p2pkv engine ready instance={node.lmcache_instance_id} url={url} model={front.names[0]}")
                task_status.started(url)


async def serve_front(front: EngineFront, listener: socket.socket, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve the calls of `front` until cancelled.

    Args:
        front: The calls.
        listener: Bound to a loopback address; becomes the server's.
        task_status: Told when requests are taken.
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_LIMIT_MS)
    application = DoorGuard(build_app(front), {listener.getsockname()[1]})
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, application, config_for(listener))
        task_status.started()


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that doesn't listen yet: who connects too early is refused instead of kept waiting."""
    if not is_loopback(host):
        raise ConfigError(f"the engine serves loopback only and can't use {host!r}; use 127.0.0.1 or localhost")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"the engine can't listen on {Address(host, port)}: {error.strerror}") from error
    return listener


def _set_up(config: Path | NodeConfig, model_directory: Path | None) -> tuple[ReferenceModel, EngineCache | None, str | None]:
    """The model; its cache, or why it has to do without one."""
    model = make_tiny_llama() if model_directory is None else load_model(model_directory)
    try:
        layout = layout_of(model.network.config)
    except UnsupportedCacheError as error:
        return model, None, str(error)
    return model, EngineCache.attach(config, model=model.name, layout=layout, weights=model.weights), None

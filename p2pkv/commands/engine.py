"""`p2pkv engine`: the reference engine, until a signal ends it."""

import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import trio

from p2pkv.config import NodeConfig
from p2pkv.engines.reference.server import serve_engine
from p2pkv.net.logs import configure_logs


async def run_engine(
    config: Path | NodeConfig, *, port: int, model_directory: Path | None, served_model_names: Sequence[str]
) -> None:
    """Serve the reference engine until SIGTERM or SIGINT. Arguments and errors are those of `serve_engine`."""
    configure_logs()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope)
            await serve_engine(config, port=port, model_directory=model_directory, served_model_names=served_model_names)


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    await anext(signals)
    scope.cancel()

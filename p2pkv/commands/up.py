"""`p2pkv up`: the nodes of a folder as child processes, kept running until a signal ends them all."""

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TextIO

import trio
import typer

from p2pkv.config import NodeConfig
from p2pkv.errors import ConfigError

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""A node that dies again and again is started at most this rarely."""
STEADY_S = 60.0
"""A node that lived so long begins again with the first pause."""
KILL_AFTER_S = 3.0
"""A child that takes longer over its end than its own `leave_s` and this is killed."""
MAX_LINE_NBYTES = 64 * 1024


def read_folder(folder: Path) -> dict[Path, NodeConfig]:
    """The configurations of every instance of `folder`, by file.

    Raises:
        ConfigError: There are none, some have problems (all are listed), or two have one name.
    """
    configs: dict[Path, NodeConfig] = {}
    problems = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            configs[path] = NodeConfig.from_yaml(path)
        except ConfigError as error:
            problems.append(str(error))
    names = [config.lmcache_instance_id for config in configs.values()]
    problems += [f"{folder} has several instances named {name}" for name in sorted(set(names)) if names.count(name) > 1]
    if not configs and not problems:
        problems.append(f"{folder} holds no *.yaml")
    if problems:
        raise ConfigError("\n".join(problems))
    return configs


async def keep_up(configs: dict[Path, NodeConfig]) -> None:
    """Run a node for each configuration, and start again those that die, until SIGTERM or SIGINT; then end all.

    Ends too when every node has left by itself.
    """
    stopping = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, signals, stopping)
            async with trio.open_nursery() as children:
                for path, config in configs.items():
                    children.start_soon(_keep_node, path, config, stopping)
            nursery.cancel_scope.cancel()


async def _stop_on_signal(signals: AsyncIterator[int], stopping: trio.Event) -> None:
    await anext(signals)
    stopping.set()


async def _keep_node(path: Path, config: NodeConfig, stopping: trio.Event) -> None:
    name = config.lmcache_instance_id
    pause_s = FIRST_PAUSE_S
    while True:
        started_at = trio.current_time()
        code = await _run_node(path, config, stopping)
        if stopping.is_set() or code == 0:
            return
        if trio.current_time() - started_at > STEADY_S:
            pause_s = FIRST_PAUSE_S
        typer.echo(f"{name} | ended with exit code {code}; starts again in {pause_s:g} s", err=True)
        with trio.move_on_after(pause_s):
            await stopping.wait()
            return
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


async def _run_node(path: Path, config: NodeConfig, stopping: trio.Event) -> int:
    """Run one node to its end, passing on what it prints; the exit code."""
    command = (sys.executable, "-m", "p2pkv", "node", "--config", str(path))
    # A session of its own: Ctrl-C in a terminal reaches it through us, once.
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with trio.open_nursery() as output:
            output.start_soon(_pass_on, process.stdout, config.lmcache_instance_id, sys.stdout)
            output.start_soon(_pass_on, process.stderr, config.lmcache_instance_id, sys.stderr)
            async with trio.open_nursery() as life:
                life.start_soon(_end_when_stopping, process, stopping, config.leave_s + KILL_AFTER_S)
                code = await process.wait()
                life.cancel_scope.cancel()
    finally:
        if process.returncode is None:
            process.kill()
    return code


async def _end_when_stopping(process: trio.Process, stopping: trio.Event, grace_s: float) -> None:
    await stopping.wait()
    process.terminate()
    await trio.sleep(grace_s)
    process.kill()


async def _pass_on(stream: trio.abc.ReceiveStream, name: str, target: TextIO) -> None:
    """Print what comes, line by line, with the instance's name before it."""
    rest = b""
    async with stream:
        async for data in stream:
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE_NBYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                typer.echo(f"{name} | {line.decode(errors='replace')}", file=target)
    if rest:
        typer.echo(f"{name} | {rest.decode(errors='replace')}", file=target)

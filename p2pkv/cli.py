"""`p2pkv`: the one place where trio starts, and where errors become exit codes.

Exit codes: 0 done (Ctrl-C too), 1 the operation failed, 2 wrong usage or configuration, 3 no node reached. Each command imports
what it needs when it runs: `p2pkv node` must be ready quickly and stay small.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from p2pkv.commands.exit_codes import exit_code_of, only_error
from p2pkv.commands.options import AsJson, ConfigFile, Model, Salt, Tokens, TokensFile, Via, example
from p2pkv.errors import ConfigError, P2pkvError

if TYPE_CHECKING:
    from p2pkv.config import NodeConfig


class _Commands(TyperGroup):
    """All commands, with errors turned into exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (P2pkvError, KeyboardInterrupt, BaseExceptionGroup) as raised:
            error = only_error(raised)
            if not isinstance(error, P2pkvError | KeyboardInterrupt):
                raise
            if isinstance(error, P2pkvError):
                typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(exit_code_of(error)) from raised


app = typer.Typer(
    cls=_Commands,
    help="Moves KV caches between LLM engines, peer to peer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run `p2pkv`."""
    app()


@app.command(epilog=example("p2pkv node --config topology/pair/instance1.yaml"))
def node(*, config: ConfigFile = None) -> None:
    """Run one instance's node until SIGTERM or Ctrl-C."""
    _run_node(_read_config(config))


@app.command(epilog=example("p2pkv controller --port 9000 --monitor-port 9001"))
def controller(
    *,
    host: Annotated[str, typer.Option(help="Where its ports are, for all of them.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The HTTP port.")] = 9000,
    monitor_port: Annotated[int, typer.Option(min=1, max=65535, help="Where instances join: their controller_url.")] = 9001,
) -> None:
    """Run a node that stores nothing, in place of lmcache_controller; the cluster goes on without it too."""
    from p2pkv.config import NodeConfig

    _run_node(NodeConfig.of_controller(host=host, port=port, monitor_port=monitor_port))


@app.command(epilog=example("p2pkv up topology/pair"))
def up(folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, metavar="FOLDER")]) -> None:
    """Run a node for every *.yaml of a folder, and keep them running until SIGTERM or Ctrl-C."""
    import trio

    from p2pkv.commands.up import keep_up, read_folder

    trio.run(keep_up, read_folder(folder))


@app.command(epilog=example("p2pkv engine --config topology/pair/instance1.yaml --port 8000"))
def engine(
    *,
    config: ConfigFile = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 for any free one.")] = 8000,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="A Hugging Face model instead of the small Llama.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name besides its own to ask for the model by; may be repeated.")
    ] = None,
) -> None:
    """Run the reference engine: completions on a small Llama that keeps its KV cache in p2pkv."""
    import trio

    from p2pkv.commands.engine import run_engine

    source = config or _read_config(None)
    trio.run(partial(run_engine, source, port=port, model_directory=model, served_model_names=served_model_name or []))


@app.command(epilog=example("p2pkv token --config instance.yaml --read-only"))
def token(
    *,
    config: ConfigFile = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="The one that allows what changes nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what clients of a cluster with a cluster_key show: 'Authorization: Bearer TOKEN', or P2PKV_TOKEN for commands."""
    from p2pkv.cluster_key import Purpose, configured_key, key_of_client

    key = key_of_client(os.environ) if config is None else configured_key(_read_config(config))
    if key is None:
        raise ConfigError("no cluster_key is configured, so nodes want no token; name a file by --config, or set one")
    access = key.token(Purpose.READ_ONLY_ACCESS if read_only else Purpose.FULL_ACCESS)
    typer.echo(json.dumps({"token": access}) if as_json else access)


@app.command(epilog=example("p2pkv demo", "p2pkv demo --vllm"))
def demo(
    *,
    with_vllm: Annotated[
        bool, typer.Option("--vllm", help="With two `vllm serve` in the place of the reference engine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The whole walk-through: nodes, engines, moves by every way in, and what was seen."""
    import trio

    from p2pkv.demo import ReferenceWalkthrough, VllmWalkthrough, run_demo

    walkthrough = VllmWalkthrough if with_vllm else ReferenceWalkthrough
    raise typer.Exit(trio.run(partial(run_demo, walkthrough, as_json=as_json)))


@app.command(
    epilog=example(
        "p2pkv move lmcache_instance_1/LocalCPUBackend lmcache_instance_2/LocalCPUBackend --tokens 1,2,3,4 --wait",
        "p2pkv move lmcache_instance_1/LocalCPUBackend lmcache_instance_2/LocalCPUBackend --all --copy",
    )
)
def move(
    old_position: Annotated[str, typer.Argument(metavar="SOURCE/LOCATION", show_default=False)],
    new_position: Annotated[str, typer.Argument(metavar="TARGET/LOCATION", show_default=False)],
    *,
    tokens: Tokens = None,
    tokens_file: TokensFile = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything at the source, instead of tokens.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Leave the source as it is.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the move has ended.")] = False,
    model: Model = None,
    cache_salt: Salt = "",
    via: Via = None,
    as_json: AsJson = False,
) -> None:
    """Move the longest prefix of a prompt's KV cache that one instance holds to another."""
    from p2pkv.commands.arguments import parse_position, parse_tokens
    from p2pkv.commands.client import open_client
    from p2pkv.commands.moves import move_and_wait
    from p2pkv.commands.output import move_text, show

    body = {
        "old_position": parse_position(old_position),
        "new_position": parse_position(new_position),
        "tokens": parse_tokens(tokens, tokens_file),
        "all": everything,
        "copy": copy,
        "model": model,
        "cache_salt": cache_salt,
    }
    with open_client(via, os.environ) as client:
        reply = move_and_wait(client, body) if wait else client.call("POST", "/move", body)
    show(reply, move_text, as_json=as_json)


@app.command(epilog=example("p2pkv lookup --tokens 1,2,3,4", "p2pkv lookup --tokens-file prompt.json --json"))
def lookup(
    *,
    tokens: Tokens = None,
    tokens_file: TokensFile = None,
    model: Model = None,
    cache_salt: Salt = "",
    via: Via = None,
    as_json: AsJson = False,
) -> None:
    """Which instances hold how much of a prompt."""
    from p2pkv.commands.arguments import parse_tokens
    from p2pkv.commands.client import open_client
    from p2pkv.commands.output import lookup_text, show

    body = {"tokens": parse_tokens(tokens, tokens_file), "model": model, "cache_salt": cache_salt}
    with open_client(via, os.environ) as client:
        show(client.call("POST", "/lookup", body), lookup_text, as_json=as_json)


@app.command(epilog=example("p2pkv members", "p2pkv members --via http://localhost:9000 --json"))
def members(*, via: Via = None, as_json: AsJson = False) -> None:
    """Every instance that the node knows, and how full it is."""
    from p2pkv.commands.client import open_client
    from p2pkv.commands.output import members_text, show

    with open_client(via, os.environ) as client:
        show(client.call("GET", "/members"), members_text, as_json=as_json)


@app.command(epilog=example("p2pkv event move~lmcache_instance_1~lmcache_instance_2~lmcache_instance_2~0123456789abcdef"))
def event(
    event_id: Annotated[str, typer.Argument(metavar="ID", show_default=False)], *, via: Via = None, as_json: AsJson = False
) -> None:
    """One move: its state, its counts, and why it failed if it did."""
    from p2pkv.commands.client import open_client
    from p2pkv.commands.output import event_text, show
    from p2pkv.http_paths import event_path

    with open_client(via, os.environ) as client:
        show(client.call("GET", event_path(event_id)), event_text, as_json=as_json)


@app.command(epilog=example("p2pkv events", "p2pkv events --json"))
def events(*, via: Via = None, as_json: AsJson = False) -> None:
    """The moves that the node knows of, newest first."""
    from p2pkv.commands.client import open_client
    from p2pkv.commands.output import events_text, show

    with open_client(via, os.environ) as client:
        show(client.call("GET", "/events"), events_text, as_json=as_json)


@app.command(epilog=example("p2pkv cancel move~lmcache_instance_1~lmcache_instance_2~lmcache_instance_2~0123456789abcdef"))
def cancel(
    event_id: Annotated[str, typer.Argument(metavar="ID", show_default=False)], *, via: Via = None, as_json: AsJson = False
) -> None:
    """End a move before it hands anything over; exits with 1 if it is too late for that."""
    from p2pkv.commands.client import open_client
    from p2pkv.commands.output import event_text, show_cancelled
    from p2pkv.http_paths import event_path

    with open_client(via, os.environ) as client:
        show_cancelled(client.call("DELETE", event_path(event_id)), event_text, as_json=as_json)


@app.command(epilog=example("p2pkv clear lmcache_instance_1/LocalCPUBackend"))
def clear(
    position: Annotated[str, typer.Argument(metavar="INSTANCE/LOCATION", show_default=False)],
    *,
    via: Via = None,
    as_json: AsJson = False,
) -> None:
    """Forget everything that an instance holds at a location, but what is pinned."""
    from p2pkv.commands.arguments import parse_position
    from p2pkv.commands.client import open_client
    from p2pkv.commands.output import clear_text, show

    instance, location = parse_position(position)
    with open_client(via, os.environ) as client:
        show(client.call("POST", "/clear", {"instance_id": instance, "location": location}), clear_text, as_json=as_json)


@app.command(
    epilog=example(
        "p2pkv pin lmcache_instance_1/LocalCPUBackend --tokens 1,2,3,4 --ttl 3600",
        "p2pkv pin lmcache_instance_1/LocalCPUBackend --tokens-file prompt.json",
    )
)
def pin(
    position: Annotated[str, typer.Argument(metavar="INSTANCE/LOCATION", show_default=False)],
    *,
    tokens: Tokens = None,
    tokens_file: TokensFile = None,
    ttl: Annotated[float | None, typer.Option(metavar="S", help="Seconds it lasts; left out: until p2pkv unpin.")] = None,
    model: Model = None,
    cache_salt: Salt = "",
    via: Via = None,
    as_json: AsJson = False,
) -> None:
    """Keep the longest prefix of a prompt that an instance holds from eviction; a move takes the pin along."""
    from p2pkv.commands.arguments import pin_body
    from p2pkv.commands.client import open_client
    from p2pkv.commands.output import pin_text, show

    body = pin_body(position, tokens, tokens_file, ttl_s=ttl, model=model, cache_salt=cache_salt)
    with open_client(via, os.environ) as client:
        show(client.call("POST", "/pin", body), pin_text, as_json=as_json)


@app.command(epilog=example("p2pkv unpin lmcache_instance_1/LocalCPUBackend --tokens 1,2,3,4"))
def unpin(
    position: Annotated[str, typer.Argument(metavar="INSTANCE/LOCATION", show_default=False)],
    *,
    tokens: Tokens = None,
    tokens_file: TokensFile = None,
    ttl: Annotated[float | None, typer.Option(metavar="S", help="Seconds it lasts still; left out: it ends at once.")] = None,
    model: Model = None,
    cache_salt: Salt = "",
    via: Via = None,
    as_json: AsJson = False,
) -> None:
    """Let what was pinned of a prompt be evicted again; one unpin ends all its pins."""
    from p2pkv.commands.arguments import pin_body
    from p2pkv.commands.client import open_client
    from p2pkv.commands.output import show, unpin_text

    body = pin_body(position, tokens, tokens_file, ttl_s=ttl, model=model, cache_salt=cache_salt)
    with open_client(via, os.environ) as client:
        show(client.call("POST", "/unpin", body), unpin_text, as_json=as_json)


@app.command(epilog=example("p2pkv health lmcache_instance_1"))
def health(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", show_default=False)],
    *,
    via: Via = None,
    as_json: AsJson = False,
) -> None:
    """Whether an instance is alive, as far as the node knows; exits with 1 if not."""
    from p2pkv.commands.client import open_client
    from p2pkv.commands.output import health_text, show

    with open_client(via, os.environ) as client:
        show(client.call("POST", "/health", {"instance_id": instance}), health_text, as_json=as_json)


@app.command(epilog=example("p2pkv top", "p2pkv top --via http://localhost:9000 --interval 0.5", "p2pkv top --once"))
def top(
    *,
    interval: Annotated[float, typer.Option(metavar="S", min=0.1, help="Seconds from one picture to the next.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end, as where no terminal is.")] = False,
    via: Via = None,
    as_json: AsJson = False,
) -> None:
    """Watch the cluster: its instances, how full they are, and the moves that the asked node knows; until Ctrl-C or q.

    When the node no longer answers, the screen says so, and it is tried again: the next member, unless --via names the node.
    """
    from p2pkv.commands.top import top

    top(via, os.environ, interval_s=interval, once=once, as_json=as_json)


@app.command(
    epilog=example(
        "p2pkv bench lmcache_instance_1 lmcache_instance_2",
        "p2pkv bench lmcache_instance_1 lmcache_instance_2 --chunks 8 --chunk-size 4MiB --rounds 20 --json",
    )
)
def bench(
    source: Annotated[str, typer.Argument(metavar="SOURCE", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TARGET", show_default=False)],
    *,
    chunks: Annotated[int, typer.Option(min=1, max=65_536, metavar="N", help="Chunks of a large move.")] = 32,
    chunk_size: Annotated[str, typer.Option(metavar="SIZE", help="Bytes of each: B, KiB, MiB or GiB.")] = "32MiB",
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Large moves there, and as many back.")] = 5,
    via: Via = None,
    as_json: AsJson = False,
) -> None:
    """Measure moves between two running instances, there and back, with chunks of its own that it clears at the end.

    The source's node must be on this host: chunks are stored there as by an engine, under a model of their own. Nothing is
    evicted for them: with too little free room at either end it refuses. Ctrl-C prints what was measured so far.
    """
    from p2pkv.commands.bench import Sizes, bench
    from p2pkv.commands.bench_report import parse_size

    bench(source, target, Sizes(chunks, parse_size(chunk_size), rounds), via, as_json=as_json)


def _run_node(config: "NodeConfig") -> None:
    """Run a node in this process, which holds no more in memory than it needs."""
    import trio

    from p2pkv.commands.lean import without_rich

    with without_rich():
        from p2pkv.commands.node import run_node

    trio.run(run_node, config)


def _read_config(path: Path | None) -> "NodeConfig":
    from p2pkv.config import NodeConfig

    return NodeConfig.from_environ() if path is None else NodeConfig.from_yaml(path)

"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar=["P2PKV_CONFIG_FILE", "LMCACHE_CONFIG_FILE"],
        help="The instance's yaml; without one, variables say it all.",
    ),
]
Via = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The node to ask; left out: the shared port, then the nodes of this host."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Tokens = Annotated[str | None, typer.Option("--tokens", metavar="1,2,3", help="Token ids of the prompt.")]
TokensFile = Annotated[Path | None, typer.Option("--tokens-file", metavar="FILE", help="A file that holds the token ids.")]
Model = Annotated[str | None, typer.Option(help="Whose cache; only needed when an instance serves several models.")]
Salt = Annotated[str, typer.Option("--cache-salt", help="The salt that the prompt was stored with.")]


def example(*lines: str) -> str:
    """The end of a command's help: how it is called, with values that work for the seed's two instances."""
    return "\n".join(("\b", "For example:", *(f"  {line}" for line in lines)))

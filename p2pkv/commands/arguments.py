"""What users write on the command line, and what it means."""

import re
from math import inf
from pathlib import Path

import typer


def parse_position(text: str) -> list[str]:
    """`instance/location` as the calls take it.

    Raises:
        typer.BadParameter: It isn't that.
    """
    instance, separator, location = text.partition("/")
    if not separator or not instance or not location or "/" in location:
        raise typer.BadParameter(f"{text!r} is no position; write INSTANCE/LOCATION, as instance1/LocalCPUBackend")
    return [instance, location]


def parse_tokens(text: str | None, file: Path | None) -> list[int]:
    """Token ids from the command line or from a file, separated by commas or spaces, with or without brackets.

    Raises:
        typer.BadParameter: Both are given, the file can't be read, or something isn't a number.
    """
    if text is not None and file is not None:
        raise typer.BadParameter("give either --tokens or --tokens-file")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{file} can't be read: {error}") from error
    words = re.split(r"[\s,]+", (text or "").strip("[], \t\r\n"))
    try:
        return [int(word) for word in words if word]
    except ValueError as error:
        raise typer.BadParameter(f"tokens are numbers, as 1,2,3: {error}") from error


def pin_body(
    position: str, tokens: str | None, tokens_file: Path | None, *, ttl_s: float | None, model: str | None, cache_salt: str
) -> dict[str, object]:
    """What `/pin` and `/unpin` take.

    Raises:
        typer.BadParameter: An argument isn't what it should be, or no tokens are given.
    """
    if tokens is None and tokens_file is None:
        raise typer.BadParameter("give the prompt by --tokens or --tokens-file")
    if ttl_s is not None and not 0 < ttl_s < inf:
        raise typer.BadParameter("--ttl takes seconds, more than 0")
    instance, location = parse_position(position)
    return {
        "instance_id": instance,
        "location": location,
        "tokens": parse_tokens(tokens, tokens_file),
        "ttl_s": ttl_s,
        "model": model,
        "cache_salt": cache_salt,
    }

"""What users write on the command line, and what it means."""

import re
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

"""A command in a terminal of a given size, as its user sees it."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from subprocess import Popen

from tests.live.command_line import COMMAND

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """What a command shows, and the keys that are pressed."""

    def __init__(self, process: "Popen[bytes]", outer: int) -> None:
        self.process = process
        self.raw = ""
        self._outer = outer

    @property
    def text(self) -> str:
        """All that was shown, without colours and the like."""
        return ESCAPE.sub("", self.raw)

    def press(self, keys: str) -> None:
        os.write(self._outer, keys.encode())

    def until_shown(self, pattern: str, within_s: float = 10) -> str:
        """Wait until the screen shows that anew."""
        begin = len(self.text)
        deadline = time.monotonic() + within_s
        while not (found := re.search(pattern, self.text[begin:])):
            assert time.monotonic() < deadline, self.text[begin:]
            assert self._read(), self.text
        return found[0]

    def until_ended(self) -> int:
        """Wait until the command ends; its exit code."""
        while self._read():
            pass
        return self.process.wait(10)

    def _read(self) -> bool:
        """Take what is shown within a tenth of a second; False once the command is gone."""
        ready, _, _ = select.select([self._outer], [], [], 0.1)
        if ready:
            try:
                self.raw += os.read(self._outer, 65_536).decode(errors="replace")
            except OSError:  # the other end is closed
                return False
        return True


@contextmanager
def open_terminal(
    *arguments: str, columns: int = 100, lines: int = 24, environ: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """Run `p2pkv` in a terminal; it ends on exit."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    unset = ("COLUMNS", "LINES", "NO_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | dict(environ or {})
    process = Popen([*COMMAND, *arguments], stdin=inner, stdout=inner, stderr=inner, env={**environment, "TERM": "xterm"})
    os.close(inner)
    try:
        yield Terminal(process, outer)
    finally:
        process.kill()
        process.wait()
        os.close(outer)

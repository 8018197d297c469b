"""What the demo notes and shows; all of it together is tests/live/test_demo.py."""

import io
import socket

import pytest
from rich.console import Console

from p2pkv.demo.stage import Stage
from p2pkv.errors import P2pkvError


@pytest.fixture
def dead_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def test_a_call_that_nobody_answers_ends_the_demo_with_a_sentence(dead_port: int) -> None:
    stage = Stage(Console(quiet=True))
    with pytest.raises(P2pkvError, match="no node answers"):
        stage.get(f"http://127.0.0.1:{dead_port}/members")
    with pytest.raises(P2pkvError, match=f"the websocket at ws://127.0.0.1:{dead_port}/control failed"):
        await stage.converse(f"ws://127.0.0.1:{dead_port}/control", {})


def test_the_table_has_what_was_checked() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120)
    stage = Stage(console)
    stage.check("water is wet", True, "[wet]")
    stage.check("fire is cold", False, "hot")
    console.print(stage.table())
    lines = out.getvalue().splitlines()
    assert any("yes" in line and "water is wet" in line and "[wet]" in line for line in lines)
    assert any("NO" in line and "fire is cold" in line and "hot" in line for line in lines)

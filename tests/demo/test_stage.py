"""What the demo notes and shows; all of it together is tests/live/test_demo.py."""

import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

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
    with pytest.raises(P2pkvError, match="no node answers"):
        stage.get_until(f"http://127.0.0.1:{dead_port}/members", lambda _: True, within_s=0.1)
    with pytest.raises(P2pkvError, match="nothing answers at"):
        stage.grep(f"http://127.0.0.1:{dead_port}/metrics", "vllm:")
    with pytest.raises(P2pkvError, match=f"the websocket at ws://127.0.0.1:{dead_port}/control failed"):
        await stage.converse(f"ws://127.0.0.1:{dead_port}/control", {})


class Counting(BaseHTTPRequestHandler):
    """Answers `/count` with how often it was asked, and `/metrics` with three lines."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        body = b"a 1\nb 2\na 3\n" if self.path == "/metrics" else b'{"count": %d}' % type(self).asked
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the standard library
        pass


def test_what_is_not_there_yet_is_waited_for(dead_port: int) -> None:
    out = io.StringIO()
    stage = Stage(Console(file=out, width=120))
    server: list[HTTPServer] = []

    def serve_later() -> None:
        time.sleep(0.1)  # nothing answers until then
        server.append(HTTPServer(("127.0.0.1", dead_port), Counting))
        server[0].serve_forever(poll_interval=0.01)

    serving = threading.Thread(target=serve_later)
    serving.start()
    url = f"http://127.0.0.1:{dead_port}"
    try:
        assert stage.get_until(f"{url}/count", lambda body: body["count"] == 3, within_s=20) == {"count": 3}
        assert stage.get_until(f"{url}/count", lambda _: False, within_s=0)["count"] == 4
        assert stage.grep(f"{url}/metrics", "a") == ["a 1", "a 3"]
    finally:
        server[0].shutdown()
        serving.join()
        server[0].server_close()
    shown = out.getvalue()
    assert shown.count(f"$ curl {url}/count") == 2
    assert f"$ curl -s {url}/metrics | grep ^a\na 1\na 3\n" in shown


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

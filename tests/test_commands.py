"""What commands make of arguments and answers, without a node."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import typer

from p2pkv.commands import moves
from p2pkv.commands.arguments import parse_position, parse_tokens, pin_body
from p2pkv.commands.client import NodeClient
from p2pkv.commands.output import move_text, table
from p2pkv.errors import NodeUnreachableError


@pytest.mark.parametrize("text", ["1,2,3", "1, 2, 3", "[1, 2, 3]", "1 2\n3\n", "[1,2,3]\n"])
def test_token_ids_are_read_however_they_are_separated(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    assert parse_tokens(text, None) == parse_tokens(None, file) == [1, 2, 3]


def test_no_tokens_are_no_tokens() -> None:
    assert parse_tokens(None, None) == parse_tokens("", None) == parse_tokens("[]", None) == []


@pytest.mark.parametrize("text", ["a", "a/", "/b", "a/b/c", ""])
def test_what_is_no_position_is_wrong_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="INSTANCE/LOCATION"):
        parse_position(text)


@pytest.mark.parametrize(
    ("tokens", "ttl_s", "named"), [(None, None, "--tokens"), ("1", 0.0, "--ttl"), ("1", float("nan"), "--ttl")]
)
def test_a_pin_needs_tokens_and_lasts_some_time(tokens: str | None, ttl_s: float | None, named: str) -> None:
    with pytest.raises(typer.BadParameter, match=named):
        pin_body("a/LocalCPUBackend", tokens, None, ttl_s=ttl_s, model=None, cache_salt="")


def test_tables_are_aligned() -> None:
    assert table(("A", "LONG"), [("xyz", 1), ("", 2)]) == "A    LONG\nxyz  1\n     2"


def scripted(answers: Iterator[tuple[int, object]]) -> NodeClient:
    """A client of a node that gives these answers, whatever it is asked."""

    def answer(_: httpx2.Request) -> httpx2.Response:
        status, body = next(answers)
        return httpx2.Response(status, content=body if isinstance(body, bytes) else json.dumps(body))

    return NodeClient(httpx2.Client(transport=httpx2.MockTransport(answer), base_url="http://node"))


def event(state: str, moved: int, error: dict[str, str] | None = None) -> tuple[int, object]:
    chunks = {"found": 4, "moved": moved, "already_there": 0, "shared_kept": 0, "failed": 0}
    return 200, {"event_id": "e", "state": state, "chunks": chunks, "bytes": moved * 2**20, "error": error}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "POLL_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_long_move_is_followed_to_its_end() -> None:
    begun = (200, {"event_id": "e", "num_tokens": 9, "state": "running"})
    answers = [begun, event("running", 1), event("running", 3), event("done", 4)]
    reply = moves.move_and_wait(scripted(iter(answers)), {})
    assert reply.body == {"event_id": "e", "num_tokens": 9, "state": "done"}


@pytest.mark.usefixtures("impatient")
def test_a_long_move_that_fails_says_why() -> None:
    begun = (200, {"event_id": "e", "num_tokens": 9, "state": "pending"})
    answers = [begun, event("failed", 0, {"error": "store_full", "detail": "There is no room."})]
    reply = moves.move_and_wait(scripted(iter(answers)), {})
    assert (reply.body["state"], reply.body["error"]) == ("failed", "store_full")
    assert move_text(reply.body) == "e: failed, 9 tokens: There is no room."


def test_a_move_that_is_refused_is_not_waited_for() -> None:
    reply = moves.move_and_wait(scripted(iter([(404, {"detail": "Who?", "error": "unknown_instance"})])), {})
    assert (reply.is_success, reply.status) == (False, 404)


@pytest.mark.parametrize("body", [b"<html>", [1], "text", b"\xff"])
def test_what_does_not_answer_like_a_node_is_none(body: object) -> None:
    with pytest.raises(NodeUnreachableError, match="no node"):
        scripted(iter([(200, body)])).call("GET", "/members")


LEAN = """
import sys
from p2pkv.commands.lean import without_rich
with without_rich():
    import p2pkv.commands.node
assert not {"rich", "pygments", "torch"} & set(sys.modules), "a node is to stay small"
import rich
"""


def test_a_nodes_process_has_no_colours_in_memory_and_may_still_load_them() -> None:
    ran = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")

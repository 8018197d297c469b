"""Pins in real stores that are full, asked for at every door of a node that holds none of it."""

import json
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import trio

from p2pkv import NodeConfig
from p2pkv.client import Client, open_client
from p2pkv.config import parse_address
from p2pkv.engines import EngineCache
from p2pkv.errors import StoreFullError
from p2pkv.net.replies import ChangedReply
from p2pkv.net.websockets import dial_websocket
from tests.live.command_line import AT, LAYOUT, PROMPT, Run, call, call_json, read_ready, write_config

pytestmark = pytest.mark.live

CAPACITY = 8
"""Chunks that fit into each node, a page each; `PROMPT` has three."""
TOKENS = ",".join(map(str, PROMPT))


class Nodes:
    """Instances a, b and c, which know each other; c is asked. a holds `PROMPT`."""

    def __init__(self, home: Path, run: Run) -> None:
        limit = f"max_local_cpu_size: {CAPACITY * 4096 / 2**30}"
        self._configs = {name: write_config(home, name, limit) for name in "abc"}
        ready = [read_ready(run("node", "--config", str(config))) for config in self._configs.values()]
        _, self.http, self.ws, *_ = ready[-1].groups()
        self._fillers = count(1000)
        deadline = time.monotonic() + 5
        while len(self.ask("GET", "/members")["members"]) < 3:
            assert time.monotonic() < deadline
        assert self.store("a", PROMPT) == len(PROMPT)

    def ask(self, method: str, path: str, **fields: object) -> dict[str, Any]:
        body = fields if method == "POST" else None
        answer: dict[str, Any] = httpx2.request(method, self.http + path, json=body, trust_env=False, timeout=10).json()
        return answer

    def engine(self, name: str) -> EngineCache:
        return EngineCache.attach(NodeConfig.from_yaml(self._configs[name]), model="tiny", layout=LAYOUT)

    def store(self, name: str, tokens: list[int]) -> int:
        with self.engine(name) as cache:
            return cache.store(tokens, torch.zeros(LAYOUT.shape(len(tokens))))

    def held(self, name: str, tokens: list[int] = PROMPT) -> int:
        with self.engine(name) as cache:
            return cache.lookup(tokens)

    def press(self, name: str) -> None:
        """Store twice what there is room for: all goes that may go."""
        with self.engine(name) as cache:
            for _ in range(2 * CAPACITY):
                assert cache.store([next(self._fillers)] * 16, torch.zeros(LAYOUT.shape(16))) == 16


@pytest.fixture
def nodes(home: Path, run: Run) -> Nodes:
    return Nodes(home, run)


# --- every door -----------------------------------------------------------------------------------------------------------


def by_http(nodes: Nodes, what: str, fields: dict[str, Any]) -> dict[str, Any]:
    return nodes.ask("POST", f"/{what}", instance_id="a", location=AT, tokens=PROMPT, **fields)


def by_control(nodes: Nodes, what: str, fields: dict[str, Any]) -> dict[str, Any]:
    message = {"id": 1, "type": what, "instance_id": "a", "location": AT, "tokens": PROMPT, **fields}

    async def ask() -> str | bytes:
        with trio.fail_after(10):
            async with dial_websocket([parse_address(nodes.ws.removeprefix("ws://"))], "/control") as websocket:
                await websocket.send_message(json.dumps(message))
                return await websocket.get_message()

    answer: dict[str, Any] = json.loads(trio.run(ask))
    assert (answer.pop("id"), answer.pop("type")) == (1, what)
    return answer


def by_command(nodes: Nodes, what: str, fields: dict[str, Any]) -> dict[str, Any]:
    ttl = ["--ttl", str(fields["ttl_s"])] if "ttl_s" in fields else []
    return call_json(what, f"a/{AT}", "--tokens", TOKENS, "--via", nodes.http, *ttl)


def by_client(nodes: Nodes, what: str, fields: dict[str, Any]) -> dict[str, Any]:
    async def ask() -> ChangedReply:
        async with open_client(nodes.http) as client:
            pin = partial({"pin": Client.pin, "unpin": Client.unpin}[what], client)
            return await pin(("a", AT), PROMPT, **fields)

    reply = trio.run(ask)
    return {"event_id": reply.event_id, "num_tokens": reply.num_tokens}


@pytest.mark.parametrize("ask", [by_http, by_control, by_command, by_client])
def test_what_is_pinned_survives_while_others_are_evicted(
    nodes: Nodes, ask: Callable[[Nodes, str, dict[str, Any]], dict[str, Any]]
) -> None:
    other = [7] * 16
    nodes.store("a", other)
    pinned = ask(nodes, "pin", {})
    assert pinned == {"event_id": pinned["event_id"], "num_tokens": len(PROMPT)}
    nodes.press("a")
    assert (nodes.held("a"), nodes.held("a", other)) == (len(PROMPT), 0)
    assert ask(nodes, "unpin", {})["num_tokens"] == len(PROMPT)
    assert ask(nodes, "pin", {"ttl_s": 0.5})["num_tokens"] == len(PROMPT)
    time.sleep(0.6)
    nodes.press("a")
    assert nodes.held("a") == 0
    assert ask(nodes, "pin", {})["num_tokens"] == 0
    assert ask(nodes, "unpin", {})["num_tokens"] == 0


# --- stores ---------------------------------------------------------------------------------------------------------------


def test_an_unpin_may_be_told_to_wait(nodes: Nodes) -> None:
    by_http(nodes, "pin", {})
    assert by_http(nodes, "unpin", {"ttl_s": 60})["num_tokens"] == len(PROMPT)
    nodes.press("a")
    assert nodes.held("a") == len(PROMPT)
    assert by_http(nodes, "unpin", {"ttl_s": 0.5})["num_tokens"] == len(PROMPT)
    time.sleep(0.6)
    nodes.press("a")
    assert nodes.held("a") == 0


def test_a_pin_goes_along_with_a_move_and_not_with_a_copy(nodes: Nodes) -> None:
    by_http(nodes, "pin", {})
    for target, fields in (("c", {"copy": True}), ("b", {})):
        moved = nodes.ask("POST", "/move", old_position=["a", AT], new_position=[target, AT], tokens=PROMPT, **fields)
        assert moved["state"] == "done"
    for name, held in (("a", 0), ("b", len(PROMPT)), ("c", 0)):
        nodes.press(name)
        assert nodes.held(name) == held
    unpinned = nodes.ask("POST", "/unpin", instance_id="b", location=AT, tokens=PROMPT)
    assert unpinned["num_tokens"] == len(PROMPT)


def test_a_store_full_of_pins_takes_nothing_more(nodes: Nodes) -> None:
    long = list(range(2000, 2000 + 16 * CAPACITY))
    assert nodes.store("b", long) == len(long)
    pinned = nodes.ask("POST", "/pin", instance_id="b", location=AT, tokens=long)
    assert pinned["num_tokens"] == len(long)
    with pytest.raises(StoreFullError, match="of them by what is pinned"):
        nodes.store("b", PROMPT)
    refused = nodes.ask("POST", "/move", old_position=["a", AT], new_position=["b", AT], tokens=PROMPT)
    assert (refused["error"], refused["state"]) == ("store_full", "failed")
    assert f"{CAPACITY * 4096} of them by what is pinned" in refused["detail"]
    assert (nodes.held("a"), nodes.held("b", long)) == (len(PROMPT), len(long))


def test_clear_leaves_what_is_pinned(nodes: Nodes) -> None:
    nodes.store("a", [7] * 16)
    by_http(nodes, "pin", {})
    assert nodes.ask("POST", "/clear", instance_id="a", location=AT)["num_tokens"] == 16
    assert (nodes.held("a"), nodes.held("a", [7] * 16)) == (len(PROMPT), 0)


# --- for people -----------------------------------------------------------------------------------------------------------


def test_the_commands_say_what_they_did(nodes: Nodes, tmp_path: Path) -> None:
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(PROMPT))
    pinned = call("pin", f"a/{AT}", "--tokens-file", str(file), "--ttl", "60")
    assert (pinned.returncode, pinned.stdout) == (0, "pinned 40 tokens\n")
    unpinned = call("unpin", f"a/{AT}", "--tokens", TOKENS)
    assert (unpinned.returncode, unpinned.stdout) == (0, "unpinned 40 tokens\n")
    assert call("pin", f"b/{AT}", "--tokens", TOKENS).stdout == "pinned 0 tokens\n"
    for wrong in (["a"], [f"a/{AT}"], [f"a/{AT}", "--tokens", "x"], [f"a/{AT}", "--tokens", "1", "--ttl", "1e9"]):
        assert call("pin", *wrong).returncode == 2
    assert call("pin", f"nobody/{AT}", "--tokens", TOKENS).returncode == 1
    assert call_json("unpin", "a/Disk", "--tokens", TOKENS, exit_code=1)["error"] == "unknown_location"

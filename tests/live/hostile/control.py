"""What a node must bear at `/control`: texts that are no requests, requests for what isn't there, broken frames."""

import json
from collections.abc import Mapping
from dataclasses import fields
from random import Random
from typing import Any

import trio

from p2pkv.core.ids import Location
from p2pkv.net.access import READING_CALLS
from p2pkv.net.calls import BUG_FIELDS, CALLS
from p2pkv.net.control import CONTROL_PATH, NO_TEXT, WATCH
from p2pkv.net.requests import WatchBody
from p2pkv.net.validation import MAX_BODY_NBYTES
from tests.live.hostile.attack import END_S, Tally, Target, connected
from tests.live.hostile.damage import VALUES, damaged_json
from tests.live.hostile.peer import LONG_IN_EVERY, fragments, send_empty_fragments, strike_handshake
from tests.live.hostile.websocket import BINARY, TEXT, EndedError, RawWebsocket, broken_frames, frame

CPU, DISK = Location
TOO_LONG = 1009
BODIES: Mapping[str, type[object]] = {name: call.body for name, call in CALLS.items()} | {WATCH: WatchBody}
FIELD_VALUES: Mapping[str, tuple[Any, ...]] = {
    "old_position": (["nobody", CPU], ["a", DISK], ["", ""], ["a", "nowhere"]),
    "new_position": (["nobody", CPU], ["a", CPU], ["b", CPU], ["a", DISK], ["\0", CPU]),
    "tokens": ([], [1, 2, 3], list(range(3000)), [2**31 - 1]),
    "copy": (None, True, False),
    "should_copy": (None, True, False),
    "all": (False, True),
    "cache_salt": ("", "salt", "\ud7ff" * 1024),
    "model": (None, "tiny", "nothing"),
    "wait_s": (0, 0.01),
    "event_id": ("move~nobody~nobody~nobody~0123456789abcdef", "move~a~b~a~0123456789abcdef", "~" * 200, "x"),
    "instance_id": ("nobody", "", "../a"),
    "instance": ("nobody", "a", "b", ""),
    "location": (DISK, "nowhere", ""),
    "ip": ("127.0.0.1", "nowhere.invalid", ""),
    "worker_ids": (None, [], [0], [-1, 2**70], list(range(1000))),
    "cursor": (None, "", "x", "999999999999"),
}
"""Valid, and senseless. None of them names chunks that anybody has: what a client may clear and move by right isn't tried."""


def request(rng: Random) -> tuple[str, dict[str, Any]]:
    """A valid call, by its name, and its fields."""
    name = rng.choice(list(BODIES))
    values = {field.name: rng.choice(FIELD_VALUES.get(field.name, VALUES)) for field in fields(BODIES[name])}  # type: ignore[arg-type]
    if name in READING_CALLS and "instance_id" in values:
        values["instance_id"] = rng.choice(["a", "b", "nobody"])
    return name, values


async def strike_control(rng: Random, target: Target, tally: Tally) -> None:
    """A client of `/control`: each text is answered once, whatever it says, and what is no text ends the websocket."""
    async with connected(target.ws) as stream:
        if rng.random() < 0.05:
            await strike_handshake(rng, target.ws, CONTROL_PATH, stream, tally)
            return
        try:
            websocket = await RawWebsocket.open(stream, target.ws, CONTROL_PATH)
            for _ in range(rng.randint(1, 5)):
                texts = [_text(rng) for _ in range(rng.randint(1, 20))]
                await websocket.send(
                    b"".join(fragments(rng, text, TEXT) if rng.random() < 0.1 else frame(TEXT, text) for text in texts)
                )
                await _expect_answers(websocket, len(texts), tally)
                tally.frames += len(texts)
            await _end(rng, websocket, tally)
        except EndedError as ended:
            raise AssertionError(f"the node ended a websocket whose requests were texts: {ended}") from ended


def _text(rng: Random) -> bytes:
    name, values = request(rng)
    message = {"id": rng.choice([1, "x", None, True, 0.5]), "type": name, **values}
    return (json.dumps(message) if rng.random() < 0.2 else damaged_json(rng, message)).encode()


async def _expect_answers(websocket: RawWebsocket, count: int, tally: Tally) -> None:
    with trio.fail_after(END_S):
        while count:
            answer = json.loads(await websocket.get_message())
            tally.outcomes[answer.get("error", answer["type"])] += 1
            assert answer.get("error") != BUG_FIELDS["error"], answer
            assert answer["type"] != "error" or answer["detail"], answer
            count -= "id" in answer  # what is pushed has none


async def _end(rng: Random, websocket: RawWebsocket, tally: Tally) -> None:
    """End the websocket, or make the node end it."""
    if rng.random() < 0.2:
        await send_empty_fragments(rng, websocket)
        tally.frames += 1
        return
    if rng.random() < 1 / LONG_IN_EVERY:
        data, code = frame(TEXT, b" " * (MAX_BODY_NBYTES + 1)), TOO_LONG
    elif rng.random() < 0.2:
        data, code = frame(BINARY, rng.randbytes(rng.randrange(100))), NO_TEXT
    else:
        data, code = broken_frames(rng), None
    ended = await _ending(websocket, data, bytewise=len(data) < 3000 and rng.random() < 0.1)
    assert code in (None, ended.code), ended
    tally.frames += 1


async def _ending(websocket: RawWebsocket, data: bytes, *, bytewise: bool) -> EndedError:
    try:
        await websocket.send(data, bytewise=bytewise)
    except EndedError as ended:
        return ended  # its first bytes were reason enough
    return await websocket.expect_end()

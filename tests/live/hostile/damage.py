"""Ways to break what was valid: bytes, msgpack maps, JSON texts."""

import json
import struct
from random import Random
from typing import Any

import msgpack

DEEP = 2000
"""Deeper than any parser here may follow, and than Python's own stack."""

MSGPACK_BOMBS = (
    b"",
    b"\xc1",
    b"\x80",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\x7f\xff\xff\xffx",
    b"\xc9\x00\x00\x00\x01\x05x",
    b"\xdd\x00\x00\x10\x00" * 400,
    b"\x91" * DEEP + b"\xc0",
    b"\x81\xa1x" * DEEP + b"\xc0",
    b"\x81\xa4type" + b"\x91" * DEEP + b"\xc0",
    b"\x82\xa4type\xa4ping\xa4type\xa4pong",
)
"""Lengths that lie, depth without end, types that nobody speaks."""

JSON_BOMBS = (
    "",
    "null",
    "[]",
    "0",
    '"text"',
    "[" * DEEP,
    '{"a":' * DEEP,
    '{"id": 1, "type": ' + "[" * DEEP + "]" * DEEP + "}",
    '{"id": 1, "type": "livez", "type": "nothing"}',
    '{"id": 1e999, "type": "livez"}',
    '{"id": ' + "9" * 5000 + ', "type": "livez"}',
    '{"id": 1, "type": "\\ud800"}',
    '{"id": 1, "type": "lookup", "tokens": [' + "1," * 3000 + "]}",
    '{"id": 1, "type": "lookup", "tokens": [' + ", ".join(["-1"] * 3000) + "]}",
    '{"id": 1, "type": "lookup", "tokens": ' + "[" * 500 + "]" * 500 + "}",
    "{" + ",".join(f'"{number}": 0' for number in range(2000)) + "}",
    "\0",
    "\ufeff{}",
    "NaN",
)

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63 - 1,
    -(2**63),
    1.5,
    1e308,
    "",
    "x" * 5000,
    "\0",
    "../../etc/passwd",
    [],
    {},
    [[[[]]]],
    [0] * 300,
    {"a": {"b": {}}},
)
"""What might stand in a field of another type."""
MSGPACK_VALUES = (*VALUES, 2**64 - 1, float("nan"), float("inf"), b"", b"\xff" * 100, ["x"] * 5000, b"\0" * 70_000)


def damaged(rng: Random, valid: bytes) -> bytes:
    """`valid` with something wrong with it, which needn't show."""
    data = bytearray(valid or b"\0")
    place = rng.randrange(len(data))
    match rng.randrange(8):
        case 0:
            del data[place:]
        case 1:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            return rng.randbytes(rng.randint(1, 2 * len(data)))
        case 3:
            data[place:place] = rng.randbytes(rng.randint(1, 16))
        case 4:
            del data[place : place + rng.randint(1, 16)]
        case 5:
            data *= 2
        case 6:
            data[place : place + 8] = rng.choice([b"\0", b"\xff", b"\x7f"]) * min(8, len(data) - place)
        case _:
            data += rng.randbytes(rng.randint(1, 64))
    return bytes(data)


def damaged_fields(rng: Random, valid: bytes) -> bytes:
    """The msgpack map `valid` with a field that is wrong, missing or unknown."""
    fields = msgpack.unpackb(valid)
    _change_fields(rng, fields, MSGPACK_VALUES)
    packed: bytes = msgpack.packb(fields)
    return packed


def damaged_message(rng: Random, valid: bytes) -> bytes:
    """A msgpack message that is broken somewhere: its bytes, its fields, or altogether."""
    match rng.randrange(3):
        case 0:
            return damaged(rng, valid)
        case 1:
            return damaged_fields(rng, valid)
        case _:
            return rng.choice(MSGPACK_BOMBS)


def damaged_json(rng: Random, fields: dict[str, Any]) -> str:
    """The JSON of `fields` with something wrong with it; text all the same."""
    match rng.randrange(4):
        case 0:
            return rng.choice(JSON_BOMBS)
        case 1:
            return damaged(rng, json.dumps(fields).encode()).decode(errors="replace")
        case _:
            _change_fields(rng, fields, VALUES)
            return json.dumps(fields)


def lying_frame(rng: Random, payload: bytes) -> bytes:
    """A frame of a unix socket or a lane whose length isn't that of its payload."""
    nbytes = rng.choice([0, len(payload) + 1, max(0, len(payload) - 1), 2**23, 2**23 + 1, 2**31, 2**32 - 1])
    return struct.pack("<I", nbytes) + payload


def _change_fields(rng: Random, fields: dict[str, Any], values: tuple[Any, ...]) -> None:
    for _ in range(rng.choice([1, 1, 1, 3])):
        name = rng.choice([*fields, "type"])
        match rng.randrange(4):
            case 0:
                fields.pop(name, None)
            case 1:
                fields[f"{name}_"] = rng.choice(values)
            case _:
                fields[name] = rng.choice(values)

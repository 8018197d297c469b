"""Messages to msgpack and back: nothing else knows msgpack.

A message is a map `{"type": "plan_request", ...fields}`: the name of its dataclass in snake case, and its fields by name.
Fields that a receiver doesn't know are ignored, so that nodes can be upgraded one by one; a missing field that has a default
takes it; an unknown type is refused. Any bytes either decode to a valid message or raise `RemoteProtocolError`.
"""

import re
from functools import cache
from typing import Any, Generic, TypeVar, get_args

import msgpack
from pydantic import TypeAdapter, ValidationError

from p2pkv.core.messages import Message
from p2pkv.errors import RemoteProtocolError
from p2pkv.wire.limits import MAX_ARRAY_ITEMS, MAX_MAP_ITEMS, MAX_MESSAGE_NBYTES

M = TypeVar("M")

_SHOWN_PROBLEMS = 3
"""Of a message that doesn't fit its type, at most this many problems are told."""


class Codec(Generic[M]):
    """Encodes and decodes the members of a union of frozen dataclasses.

    Args:
        union: `A | B | ...`, dataclasses with different names and no field named `type`.
    """

    def __init__(self, union: object) -> None:
        kinds: tuple[type[M], ...] = get_args(union)
        self._names = {kind: _snake_case(kind.__name__) for kind in kinds}
        self._adapters: dict[str, TypeAdapter[M]] = {name: TypeAdapter(kind) for kind, name in self._names.items()}

    def encode(self, message: M) -> bytes:
        """The msgpack of `message`."""
        name = self._names[type(message)]
        fields: dict[str, Any] = self._adapters[name].dump_python(message)
        packed: bytes = msgpack.packb({"type": name, **fields})
        return packed

    def decode(self, data: bytes) -> M:
        """The message that `data` encodes.

        Raises:
            RemoteProtocolError: It encodes none. The text says why, and repeats nothing of what was sent but field names.
        """
        fields = _unpack(data)
        name = fields.pop("type", None)
        adapter = self._adapters.get(name) if isinstance(name, str) else None
        if adapter is None:
            raise RemoteProtocolError("the message has no type that this version knows")
        try:
            return adapter.validate_python(fields)
        except ValidationError as error:
            raise RemoteProtocolError(f"not a valid {name}: {_problems(error)}") from error


def _unpack(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_MESSAGE_NBYTES:
        raise RemoteProtocolError(f"the message has {len(data)} bytes, the limit is {MAX_MESSAGE_NBYTES}")
    try:
        fields = msgpack.unpackb(data, use_list=False, max_array_len=MAX_ARRAY_ITEMS, max_map_len=MAX_MAP_ITEMS, max_ext_len=0)
    except ValueError as error:
        raise RemoteProtocolError(f"not msgpack within our limits: {type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise RemoteProtocolError("the message is no map")
    return fields


def _problems(error: ValidationError) -> str:
    shown = error.errors(include_url=False, include_context=False, include_input=False)[:_SHOWN_PROBLEMS]
    return "; ".join(f"{'.'.join(map(str, problem['loc']))[:128]}: {problem['msg'][:128]}" for problem in shown)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


@cache
def peer_codec() -> Codec[Message]:
    """The codec of what peers tell each other; building it takes 0.1 s, hence once, and not on import."""
    return Codec(Message)

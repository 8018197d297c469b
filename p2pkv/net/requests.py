"""What the calls take, field by field, and what it means to the core.

Validated strictly: unknown fields, numbers as text, true as 1 and the like are refused.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Len
from pydantic import (
    ConfigDict,
    FailFast,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
)
from pydantic.dataclasses import dataclass as validated
from pydantic_core import CoreSchema
from pydantic_core.core_schema import with_info_wrap_validator_function

from p2pkv.core.ids import EVENT_ID_MAX_LENGTH, Location, Position, is_instance_id
from p2pkv.core.keys import MAX_TOKEN_ID, MAX_TOKENS, TokenBytes, pack_tokens
from p2pkv.core.records import Operation, Selection
from p2pkv.errors import ErrorCode, Failure, InvalidRequestError, UnknownLocationError, UnknownNameError

MAX_TEXT_LENGTH = 1024
"""Of any text in a request."""
WORKERS_MAX = 1024
"""Of any list of workers; the wire takes no larger world."""

# FailFast: a million wrong tokens are one error, not a million.
_TokenList = Annotated[list[Annotated[int, Ge(0), Le(MAX_TOKEN_ID)]], Len(0, MAX_TOKENS), FailFast()]


def _pack(
    value: object, validate: ValidatorFunctionWrapHandler, others: ValidationInfo[TokenBytes | ValueError | None]
) -> TokenBytes:
    """Token ids as the core has them. Those of a long list were taken out before, and where it stood it is empty."""
    if others.context is None or value != []:
        return pack_tokens(validate(value))
    if isinstance(others.context, ValueError):
        raise others.context
    return others.context


def _packing_schema(_: object, handler: GetCoreSchemaHandler) -> CoreSchema:
    return with_info_wrap_validator_function(_pack, handler.generate_schema(_TokenList))


Tokens = Annotated[TokenBytes, GetPydanticSchema(_packing_schema)]
"""A JSON list of token ids, packed on arrival."""
Text = Annotated[str, Len(0, MAX_TEXT_LENGTH)]
ModelName = Annotated[str, Len(1, 512)]
IdempotencyKey = Annotated[str, Len(1, 256)]
EventName = Annotated[str, Len(1, EVENT_ID_MAX_LENGTH)]
WaitS = Annotated[float, Ge(0), Le(600)]
PIN_MAX_S = 10 * 365 * 86_400.0
"""Ten years: who wants it for longer leaves `ttl_s` out."""

STRICT = ConfigDict(extra="forbid", strict=True)


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class MoveBody:
    """Move the KV cache of a prompt from one position to another.

    Attributes:
        old_position: `[instance, location]` of the source.
        new_position: `[instance, location]` of the target.
        tokens: The prompt's token ids; the longest prefix that is held is moved.
        copy: Leave the source as it is.
        should_copy: LMCache's newer name of `copy`.
        all: Everything at the old position, instead of `tokens`.
        cache_salt: The salt that the prompt was stored with.
        model: Whose cache; only needed when an instance serves several.
        wait_s: How long the answer may wait for the move's end, seconds.
        idempotency_key: Of the client's choice. A retry with the same key, through any node, is answered with the first one's
            event, unless that failed or was cancelled. Kept as long as the event.
    """

    old_position: tuple[Text, Text]
    new_position: tuple[Text, Text]
    tokens: Tokens = b""
    copy: bool | None = None
    should_copy: bool | None = None
    all: bool = False
    cache_salt: Text = ""
    model: ModelName | None = None
    wait_s: WaitS = 5.0
    idempotency_key: IdempotencyKey | None = None

    def operation(self) -> Operation:
        """Whether it is a move or a copy.

        Raises:
            InvalidRequestError: `copy` and `should_copy` contradict each other.
        """
        said = {self.copy, self.should_copy} - {None}
        if len(said) > 1:
            raise InvalidRequestError(Failure(ErrorCode.INVALID_REQUEST, "copy and should_copy contradict each other."))
        return Operation.COPY if said == {True} else Operation.MOVE

    def selection(self) -> Selection:
        """Which chunks it takes.

        Raises:
            InvalidRequestError: `all` came together with tokens.
        """
        if self.all and self.tokens:
            raise InvalidRequestError(Failure(ErrorCode.INVALID_REQUEST, "Give either tokens or all, not both."))
        return Selection.ALL if self.all else Selection.TOKENS


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class LookupBody:
    """Ask which instances hold how much of a prompt.

    Attributes:
        tokens: The prompt's token ids.
        model: Whose cache; all models' when left out.
        cache_salt: The salt that the prompt was stored with.
    """

    tokens: Tokens
    model: ModelName | None = None
    cache_salt: Text = ""


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class EventBody:
    """Name an event.

    Attributes:
        event_id: As the call that began it answered.
    """

    event_id: EventName


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class WatchBody:
    """Follow events.

    Attributes:
        event_id: The one to follow until its end; all that this node is told of when left out.
    """

    event_id: EventName | None = None


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class HealthBody:
    """Ask whether an instance is alive."""

    instance_id: Text


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class QueryInstanceBody:
    """Ask which instance is at an address.

    Attributes:
        ip: Host of its websocket door.
        event_id: Comes back in the answer; a new one when left out.
    """

    ip: Text
    event_id: EventName | None = None


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class QueryWorkerInfoBody:
    """Ask for an instance's workers.

    Attributes:
        instance_id: Its name.
        worker_ids: Of which workers; all when left out.
    """

    instance_id: Text
    worker_ids: Annotated[list[int], Len(0, WORKERS_MAX)] | None = None


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class PositionBody:
    """Name a position, all of which is meant."""

    instance_id: Text
    location: Text


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class PinBody:
    """Pin a prompt at a position, or unpin it there.

    Attributes:
        instance_id: Whose position.
        location: Of that instance.
        tokens: The prompt's token ids; the longest prefix that is held is meant.
        ttl_s: Of `/pin`: how long it lasts, seconds; until it is unpinned when left out. Of `/unpin`: how long it lasts still;
            it ends at once when left out.
        cache_salt: The salt that the prompt was stored with.
        model: Whose cache; only needed when an instance serves several.
    """

    instance_id: Text
    location: Text
    tokens: Tokens
    ttl_s: Annotated[float, Gt(0), Le(PIN_MAX_S)] | None = None
    cache_salt: Text = ""
    model: ModelName | None = None


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class CompressBody:
    """Ask for what isn't offered; these are LMCache's fields, none of which changes the answer."""

    instance_id: Text = ""
    location: Text = ""
    method: Text = ""
    tokens: Tokens = b""


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class InventoryBody:
    """Ask for a page of what an instance holds.

    Attributes:
        instance: Its name.
        location: One of its locations; all when left out.
        cursor: `next` of the page before; the first page when left out.
    """

    instance: Text
    location: Text | None = None
    cursor: Text | None = None


@validated(frozen=True, slots=True, kw_only=True, config=STRICT)
class EmptyBody:
    """Nothing more to say."""


def parse_position(position: tuple[str, str]) -> Position:
    """The position that a request names.

    Raises:
        UnknownNameError: No instance can have such a name.
        UnknownLocationError: There is no such location anywhere.
    """
    instance, location = position
    if not is_instance_id(instance):
        detail = f"No instance can be named {instance!r}. `p2pkv members` lists those that are known."
        raise UnknownNameError(Failure(ErrorCode.UNKNOWN_INSTANCE, detail))
    return Position(instance=instance, location=parse_location(location))


def parse_location(location: str) -> Location:
    """The location that a request names.

    Raises:
        UnknownLocationError: There is no such location anywhere.
    """
    try:
        return Location(location)
    except ValueError as error:
        known = " and ".join(Location)
        detail = f"There is no location {location!r}; locations are {known}."
        raise UnknownLocationError(Failure(ErrorCode.UNKNOWN_LOCATION, detail)) from error

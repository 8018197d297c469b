"""What the HTTP calls take, field by field, and what it means to the core.

Validated strictly: unknown fields, numbers as text, true as 1 and the like are refused.
"""

from typing import Annotated

from annotated_types import Ge, Le, Len
from pydantic import ConfigDict, FailFast, Field
from pydantic.dataclasses import dataclass as validated

from p2pkv.core.ids import EVENT_ID_MAX_LENGTH, Location, Position, is_instance_id
from p2pkv.core.keys import MAX_TOKEN_ID, MAX_TOKENS
from p2pkv.core.records import Operation, Selection
from p2pkv.errors import ErrorCode, Failure, InvalidRequestError, UnknownLocationError, UnknownNameError

MAX_TEXT_LENGTH = 1024
"""Of any text in a request."""

# FailFast: a million wrong tokens are one error, not a million.
Tokens = Annotated[list[Annotated[int, Ge(0), Le(MAX_TOKEN_ID)]], Len(0, MAX_TOKENS), FailFast()]
Text = Annotated[str, Len(0, MAX_TEXT_LENGTH)]
ModelName = Annotated[str, Len(1, 512)]

_STRICT = ConfigDict(extra="forbid", strict=True)


@validated(frozen=True, slots=True, kw_only=True, config=_STRICT)
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
    """

    old_position: tuple[Text, Text]
    new_position: tuple[Text, Text]
    tokens: Tokens = Field(default_factory=list)
    copy: bool | None = None
    should_copy: bool | None = None
    all: bool = False
    cache_salt: Text = ""
    model: ModelName | None = None
    wait_s: Annotated[float, Ge(0), Le(600)] = 5.0

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


@validated(frozen=True, slots=True, kw_only=True, config=_STRICT)
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


@validated(frozen=True, slots=True, kw_only=True, config=_STRICT)
class CheckFinishBody:
    """Ask for the state of an event."""

    event_id: Annotated[str, Len(1, EVENT_ID_MAX_LENGTH)]


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
    try:
        return Position(instance=instance, location=Location(location))
    except ValueError as error:
        known = " and ".join(Location)
        detail = f"There is no location {location!r}; locations are {known}."
        raise UnknownLocationError(Failure(ErrorCode.UNKNOWN_LOCATION, detail)) from error

"""The one error tree, cut by what the caller has to do about it.

`Failure` is an error as a value: the core answers with it, messages carry it, events record it. The exceptions below are what
Python callers see; `failure_error` turns the one into the other. A miss (nothing held) is a value, never an error.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar

from annotated_types import Len

DETAIL_MAX_LENGTH = 4096
"""Of a sentence that a peer may send; ours are far shorter."""


class ErrorCode(StrEnum):
    """Every `error` that a door may answer; `net/http` gives each its status."""

    INVALID_REQUEST = "invalid_request"
    UNKNOWN_INSTANCE = "unknown_instance"
    UNKNOWN_LOCATION = "unknown_location"
    UNKNOWN_EVENT = "unknown_event"
    NAMESPACE_MISMATCH = "namespace_mismatch"
    INSTANCE_ID_IN_USE = "instance_id_in_use"
    INSTANCE_UNREACHABLE = "instance_unreachable"
    LEAVING = "leaving"
    STORE_FULL = "store_full"
    TRANSFER_FAILED = "transfer_failed"
    CANCELLED = "cancelled"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    PROTOCOL_ERROR = "protocol_error"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_IMPLEMENTED = "not_implemented"


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, as a value.

    Attributes:
        code: For programs.
        detail: A sentence that a person can act on.
    """

    code: ErrorCode
    detail: Annotated[str, Len(0, DETAIL_MAX_LENGTH)]


class P2pkvError(Exception):
    """Base of all our errors."""


class ConfigError(P2pkvError):
    """The configuration must be changed; nothing was started. The text lists every problem found."""


class PortInUseError(ConfigError):
    """Something else uses a port that the configuration names."""


class RemoteProtocolError(P2pkvError):
    """A peer or client broke the protocol. Its connection is closed; nothing it sent last was acted on."""


class DialRefusedError(P2pkvError):
    """An address that this node doesn't dial: nobody's, or outside `allowed_peer_networks`. Nothing was sent there."""


class NodeUnreachableError(P2pkvError):
    """No node answered at the place asked. Start one, or name another."""


class SealRefusedError(P2pkvError):
    """Lent memory can't be sealed: it is still mapped, has holes, or was taken back. Drop it; nobody may read it."""


class ForeignMemoryError(P2pkvError):
    """A descriptor from outside isn't sealed memory of the announced size. It was closed, nothing was adopted."""


class DamagedFileError(P2pkvError):
    """A file isn't a whole shard as it was written. Set it aside; nothing of it may be used."""


class UnreadableShardError(P2pkvError):
    """A shard on disk can't be had: it is gone, damaged, or the disk fails. The text says which, as part of a sentence."""


class RouteRefusedError(P2pkvError):
    """A lane to a source couldn't be opened, and nothing was fetched. Try another route; the text is a sentence."""


class UnsupportedCacheError(P2pkvError):
    """This KV cache can't be expressed in the canonical layout: run the model, or the request, without p2pkv.

    Attributes:
        reason: Its short name, for logs and programs.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class FailureError(P2pkvError):
    """A request was refused or failed; `failure` says why. Each subclass says what to do."""

    codes: ClassVar[tuple[ErrorCode, ...]] = ()

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


class InvalidRequestError(FailureError):
    """Change the request: it can never succeed as it is."""

    codes = (ErrorCode.INVALID_REQUEST, ErrorCode.PROTOCOL_ERROR)


class UnknownNameError(FailureError):
    """The instance or event named isn't known here. Check the name, or wait until it has joined."""

    codes = (ErrorCode.UNKNOWN_INSTANCE, ErrorCode.UNKNOWN_EVENT)


class UnknownLocationError(FailureError):
    """The instance has no such location. Nothing was touched."""

    codes = (ErrorCode.UNKNOWN_LOCATION,)


class NamespaceMismatchError(FailureError):
    """The two ends' caches can't be exchanged: another model, dtype, layout, chunk size or world size."""

    codes = (ErrorCode.NAMESPACE_MISMATCH,)


class InstanceIdInUseError(FailureError):
    """A living instance has this name. Choose another, or stop the other one."""

    codes = (ErrorCode.INSTANCE_ID_IN_USE,)


class StoreFullError(FailureError):
    """The limit is reached and nothing can be evicted. What was held before is held still."""

    codes = (ErrorCode.STORE_FULL,)


class AccessDeniedError(FailureError):
    """Show a token, or the full one instead of the read-only one. Nothing was done."""

    codes = (ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN)


class NotOfferedError(FailureError):
    """p2pkv doesn't do this at all; `detail` says what to do instead. Nothing was done."""

    codes = (ErrorCode.NOT_IMPLEMENTED,)


class UnavailableError(FailureError):
    """Try again later, or elsewhere: an instance is unreachable, leaving, or didn't finish in time."""

    codes = (
        ErrorCode.INSTANCE_UNREACHABLE,
        ErrorCode.LEAVING,
        ErrorCode.TRANSFER_FAILED,
        ErrorCode.CANCELLED,
        ErrorCode.DEADLINE_EXCEEDED,
    )


def failure_error(failure: Failure) -> FailureError:
    """The exception that stands for `failure`."""
    for kind in FailureError.__subclasses__():
        if failure.code in kind.codes:
            return kind(failure)
    return FailureError(failure)

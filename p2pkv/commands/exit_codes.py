"""How `p2pkv` ends."""

from enum import IntEnum

from p2pkv.errors import ConfigError, InvalidRequestError, NodeUnreachableError, P2pkvError


class ExitCode(IntEnum):
    """What scripts go by."""

    DONE = 0
    FAILED = 1
    WRONG_USAGE = 2
    NO_NODE = 3


def only_error(error: BaseException) -> BaseException:
    """The error in a group of one, as nurseries wrap it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def exit_code_of(error: P2pkvError | KeyboardInterrupt) -> ExitCode:
    """How a command ends that raised `error`."""
    match error:
        case KeyboardInterrupt():
            return ExitCode.DONE
        case ConfigError() | InvalidRequestError():
            return ExitCode.WRONG_USAGE
        case NodeUnreachableError():
            return ExitCode.NO_NODE
        case _:
            return ExitCode.FAILED

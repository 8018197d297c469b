"""Commands to one instance, given to any node: carried out there once, and answered."""

import pytest

from p2pkv.core.commands import COMMAND_S
from p2pkv.core.events import ClearRequested
from p2pkv.core.ids import InstanceId, Location, RequestId
from p2pkv.core.messages import ClearRequest, CommandAnswer
from p2pkv.errors import ErrorCode
from tests.core.builders import at, prompt
from tests.core.cluster import Cluster


def clear(cluster: Cluster, instance: InstanceId, *, by: InstanceId, location: Location = Location.LOCAL_CPU) -> RequestId:
    return cluster.ask(by, lambda request: ClearRequested(request, at(instance, location)))


@pytest.mark.parametrize("by", ["a", "b"])
def test_clear_forgets_everything_there_whoever_is_asked(by: InstanceId) -> None:
    cluster = Cluster("a", "b")
    cluster.store("a", prompt(10))
    cluster.store("b", prompt(10))
    request = clear(cluster, "a", by=by)
    assert cluster.answers[request].value == 10
    assert cluster.held_tokens("a", prompt(10)) == 0
    assert cluster.held_tokens("b", prompt(10)) == 10


@pytest.mark.parametrize("lost", [ClearRequest, CommandAnswer])
def test_a_lost_message_is_repeated_and_the_command_is_carried_out_once(lost: type[ClearRequest | CommandAnswer]) -> None:
    cluster = Cluster("a", "b")
    cluster.store("a", prompt(10))
    cluster.lose(lost)
    request = clear(cluster, "a", by="b")
    cluster.store("a", prompt(6))
    cluster.heal()
    cluster.run(2.0)
    assert cluster.answers[request].value == (12 if lost is ClearRequest else 10)
    assert cluster.held_tokens("a", prompt(6)) == (0 if lost is ClearRequest else 6)


def test_what_is_unknown_or_dead_is_refused_by_name() -> None:
    cluster = Cluster("a", "b")
    assert cluster.failure_of(clear(cluster, "nobody", by="a")) is ErrorCode.UNKNOWN_INSTANCE
    assert cluster.failure_of(clear(cluster, "b", by="a", location=Location.LOCAL_DISK)) is ErrorCode.UNKNOWN_LOCATION
    cluster.crash("b")
    cluster.run(5.0)
    assert cluster.failure_of(clear(cluster, "b", by="a")) is ErrorCode.INSTANCE_UNREACHABLE


def test_no_answer_is_unreachable() -> None:
    cluster = Cluster("a", "b")
    cluster.lose(ClearRequest)
    request = clear(cluster, "b", by="a")
    cluster.run(COMMAND_S + 0.1)
    assert cluster.failure_of(request) is ErrorCode.INSTANCE_UNREACHABLE

"""The ways to a source's chunks: by handoff on one host, else over TCP, and what happens when neither works."""

import pytest

from p2pkv.core.effects import FetchChunks
from p2pkv.core.ids import Address
from p2pkv.core.records import EventState, HandoffAddress, Lane, Operation
from p2pkv.errors import ErrorCode
from tests.core.builders import prompt
from tests.core.cluster import Cluster

TRANSFER = Address("elsewhere", 3)
OTHER_HOST = HandoffAddress(host_id="another", path="/lane")


def test_on_one_host_descriptors_are_handed_over() -> None:
    cluster = Cluster("a", "b", transfer=TRANSFER)
    cluster.store("a", prompt(12))
    assert cluster.move("a", "b", prompt(12)).lane is Lane.HANDOFF


@pytest.mark.parametrize("handoff", [None, OTHER_HOST])
def test_without_a_handoff_in_common_chunks_come_over_tcp(handoff: HandoffAddress | None) -> None:
    cluster = Cluster("a", transfer=TRANSFER)
    cluster.boot("b", handoff=handoff)
    cluster.run(1.0)
    cluster.store("a", prompt(12))
    event = cluster.move("a", "b", prompt(12))
    assert (event.state, event.lane) == (EventState.DONE, Lane.TCP)


@pytest.mark.parametrize("operation", list(Operation))
def test_a_refused_handoff_falls_back_to_tcp(operation: Operation) -> None:
    cluster = Cluster("a", "b", transfer=TRANSFER)
    cluster.refused_routes = (HandoffAddress,)
    cluster.store("a", prompt(12))
    event = cluster.move("a", "b", prompt(12), operation=operation)
    assert (event.state, event.lane, event.error) == (EventState.DONE, Lane.TCP, None)
    assert cluster.held_tokens("b", prompt(12)) == 12


def test_when_every_route_is_refused_the_move_fails_and_nothing_is_lost() -> None:
    cluster = Cluster("a", "b", transfer=TRANSFER)
    cluster.refused_routes = (HandoffAddress, Address)
    cluster.store("a", prompt(12))
    event = cluster.move("a", "b", prompt(12))
    assert event.state is EventState.FAILED
    assert event.error is not None
    assert event.error.code is ErrorCode.TRANSFER_FAILED
    assert cluster.held_tokens("a", prompt(12)) == 12
    assert cluster.held_tokens("b", prompt(12)) == 0


def test_a_source_that_is_lost_while_a_route_is_refused_ends_the_move() -> None:
    cluster = Cluster("a", "b", "c", transfer=TRANSFER)
    cluster.refused_routes = (HandoffAddress, Address)
    cluster.store("a", prompt(12))
    cluster.hold(FetchChunks)
    name = cluster.begin("a", "b", prompt(12), by="c")
    cluster.crash("a")
    cluster.run(5.0)
    cluster.release()
    cluster.run(5.0)
    assert cluster.event("c", name).state is EventState.FAILED
    assert cluster.held_tokens("b", prompt(12)) == 0

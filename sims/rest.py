"""When everything has come to rest, and what must hold then: nothing is left over, and all nodes know alike what there is."""

from functools import partial

from p2pkv.core.directory import Held
from p2pkv.core.effects import AnswerValue
from p2pkv.core.events import EventAsked
from p2pkv.core.ids import EventId, InstanceId, Location, parse_event_id
from p2pkv.core.keys import Identity, TokenBytes, fingerprint
from p2pkv.core.records import EventRecord, MemberState
from p2pkv.errors import Failure
from sims.engine import longest_prefix
from sims.ledger import PromiseBrokenError
from sims.story import brief
from sims.world import Node, World

ASK_S = 3.0
"""For a question about an event: it waits 2 s for its parties, and nothing gets lost any more."""


def is_at_rest(world: World) -> bool:
    """Whether nothing is under way any more: no move, no request, no engine at work, nobody gone, unseen or standing still."""
    return (
        world.network.is_whole()
        and not world.promises.open_moves()
        and all(_rests(world, node) for node in world.nodes.values())
    )


def _rests(world: World, node: Node) -> bool:
    is_idle = not node.answers and not node.staged and not _open_events(node)
    is_seeing = all(member.state is MemberState.ALIVE for member in node.machine.members())
    is_linked = len({peer.name for peer, _ in node.links.values()}) == len(world.nodes) - 1
    return node.is_up and node.stands_until <= world.clock.now and is_idle and is_seeing and is_linked


def _open_events(node: Node) -> list[EventId]:
    """Moves that a node takes part in and that go on, as far as it knows."""
    going_on = [record.event_id for record in node.machine.events() if not record.state.is_final]
    return [event_id for event_id in going_on if node.name in _parties(event_id)]


def _parties(event_id: EventId) -> tuple[InstanceId, ...]:
    parties = parse_event_id(event_id)
    return () if parties is None else (parties.source, parties.target, parties.coordinator)


def check_at_rest(world: World, prompts: list[TokenBytes]) -> None:
    """Check everything that must hold at rest.

    Raises:
        PromiseBrokenError: A rule is broken.
        AssertionError: A machine has something left over.
    """
    world.promises.check_at_rest()
    for node in world.nodes.values():
        node.machine.check_at_rest(world.clock.now)
        _check_nothing_is_left(node)
    _check_members(world)
    _check_inventories(world)
    _check_lookups(world, prompts)
    _check_events(world)


def _check_nothing_is_left(node: Node) -> None:
    for what, left in (
        ("is asked and never answered", node.answers),
        ("has staged bytes that nobody will ever own", node.staged),
        ("thinks that moves go on that have ended", _open_events(node)),
    ):
        if left:
            raise PromiseBrokenError(f"M6: {node.name} {what}: {list(left)}", tuple(map(str, left)))


def _check_members(world: World) -> None:
    """L4: all know each other, in their latest boots."""
    expected = sorted((node.name, node.machine.config.generation, MemberState.ALIVE) for node in world.nodes.values())
    for node in world.nodes.values():
        known = [(each.instance, each.generation, each.state) for each in node.machine.members()]
        if known != expected:
            raise PromiseBrokenError(f"L4: {node.name} knows {known}, there are {expected}")


def _check_inventories(world: World) -> None:
    """I6: each knows of each exactly what it holds."""
    for owner in world.nodes.values():
        held = sorted(map(fingerprint, owner.resident))
        for node in world.nodes.values():
            seen = [each.fingerprint for each in node.machine.inventory_of(owner.name)]
            if seen != held:
                raise PromiseBrokenError(f"I6: {node.name} sees {len(seen)} chunks at {owner.name}, which holds {len(held)}")


def _check_lookups(world: World, prompts: list[TokenBytes]) -> None:
    """Each finds what a naive search through the bytes that are there finds."""
    for tokens in prompts:
        lengths = {node.name: longest_prefix(tokens, node.resident) for node in world.nodes.values()}
        expected = tuple(Held(name, Location.LOCAL_CPU, length) for name, length in sorted(lengths.items()) if length)
        for node in world.nodes.values():
            found = node.machine.lookup(tokens, None, Identity())
            if found != expected:
                raise PromiseBrokenError(f"I6: {node.name} finds {found}, there is {expected}")


def _tell(answers: dict[EventId, AnswerValue], event_id: EventId, value: AnswerValue, _failure: Failure | None) -> None:
    answers[event_id] = value


def _check_events(world: World) -> None:
    """E8: any node tells of an event as its source does, or, when the source has ended since, as the other parties do.

    Where one was thought dead that wasn't, a source and a target may each have written the end as it saw it.
    """
    answers: dict[EventId, AnswerValue] = {}
    nodes = list(world.nodes.values())
    for index, event_id in enumerate(world.promises.sightings.moves):
        told = partial(_tell, answers, event_id)
        world.request(nodes[index % len(nodes)], partial(EventAsked, event_id=event_id), told)
    world.clock.run(until=world.clock.now + ASK_S)
    for event_id, seen in world.promises.sightings.moves.items():
        told_record = answers[event_id]
        known = [world.nodes[name].machine.event(event_id) for name in _parties(event_id)]
        is_source_heard = not seen.is_source_lost and not world.false_death_count
        is_right = told_record == seen.record if is_source_heard else isinstance(told_record, EventRecord) or not any(known)
        if not is_right:
            raise PromiseBrokenError(f"E8: a node tells {brief(told_record)}, its source {brief(seen.record)}", (event_id,))

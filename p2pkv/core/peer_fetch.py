"""What an engine looks up and isn't held here, is it worth fetching from a peer, and how long is it worth waiting for?

Rules (`docs/protocol.md` numbers them):
    A lookup that misses starts a *flight*: a copy, coordinated here, of the prompt from the peer that saves most time over
    computing it. From a peer on this host, that is always worth it.
    One flight brings a token: a lookup that wants what a flight brings waits for that flight, and starts its own only for what
    is missing then.
    Nobody waits for a flight longer than computing would take. Lookups answer without it from then on; what it brings counts
    later. A prompt whose flight didn't bring what was hoped for isn't tried again for `RETRY_S`.

A lookup is answered at once, and says whether it is worth asking again; so nothing here has a deadline of its own.

Not decided here: how a copy goes (`moves`), what is held (`serving`), who holds what (`gossip`, `directory`).
"""

from dataclasses import dataclass
from math import inf

from p2pkv.core.config import MachineConfig
from p2pkv.core.directory import Held, PromptFingerprints
from p2pkv.core.effects import Found
from p2pkv.core.events import LookupRequested
from p2pkv.core.gossip import Gossip
from p2pkv.core.history import History
from p2pkv.core.ids import EventId, Location, Position
from p2pkv.core.keys import TOKEN_NBYTES, ChunkKey, Namespace, chunk_key, token_count
from p2pkv.core.membership import Membership
from p2pkv.core.messages import PlanRequest
from p2pkv.core.moves.coordinator import Coordinator
from p2pkv.core.moves.fetching import routes_between
from p2pkv.core.moves.tcp_rate import TcpRate
from p2pkv.core.outbox import Outbox
from p2pkv.core.prompt import Prompt, prompt_of
from p2pkv.core.records import HandoffAddress, Operation, Selection
from p2pkv.core.serving import Serving

PREFILL_TOKENS_PER_S = 30_000.0
"""Of an engine that doesn't say: Llama-3.1-8B on an H100 (measured: 512 tokens in 27 ms, 8,192 in 261 ms)."""
TCP_SETUP_S = 0.01
"""Plan, offer and lane of a copy, before its first byte: 5 ms on one host (`./dev bench small`), and a network adds its own."""
LEAST_PATIENCE_S = 0.2
"""For a flight, however fast the engine computes: a busy node answers late, and a short prompt is cheap to wait for."""
RETRY_S = 5.0
"""As long as a plan may take: whatever made a flight fail has been noticed by then, or has passed."""
FLIGHTS_MAX = 64
"""Prompts on their way here at once; each holds its tokens. The next ones are computed."""
WISHES_MAX = 256
"""Prompts that someone waits for, or that aren't to be tried again yet."""


@dataclass(slots=True)
class _Flight:
    """A copy on its way here.

    `num_tokens` of `prompt` is what it is expected to bring, then what its source says; it is awaited until `until`.
    """

    event_id: EventId
    wish: ChunkKey
    prompt: Prompt
    num_tokens: int
    until: float

    def brings_more(self, prompt: Prompt, held_tokens: int) -> bool:
        """Whether the first token of `prompt` that isn't held here is among those that it brings."""
        nbytes = (held_tokens + 1) * TOKEN_NBYTES
        is_long_enough = self.num_tokens > held_tokens
        return is_long_enough and self.prompt.root == prompt.root and self.prompt.tokens[:nbytes] == prompt.tokens[:nbytes]


@dataclass(slots=True)
class _Wish:
    """A prompt that lookups wait for until `until`, and that isn't tried again before `retry_at`.

    `num_tokens` is what its own flight should bring; 0 while it waits for another prompt's.
    """

    until: float
    retry_at: float
    num_tokens: int = 0

    @property
    def is_flying(self) -> bool:
        """Whether its own flight is under way."""
        return self.retry_at == inf


@dataclass(frozen=True, slots=True)
class _Miss:
    """A lookup that finds fewer tokens here than it asks for."""

    event: LookupRequested
    namespace: Namespace
    prompt: Prompt
    held_tokens: int

    def compute_s(self, num_tokens: int) -> float:
        """How long the engine takes to compute what is missing of the first `num_tokens`."""
        return (num_tokens - self.held_tokens) / (self.event.prefill_tokens_per_s or PREFILL_TOKENS_PER_S)

    def nbytes(self, num_tokens: int) -> int:
        """Size of what is missing of the first `num_tokens`, all workers' shards together."""
        return self.namespace.shard_nbytes(num_tokens - self.held_tokens) * self.namespace.shard_count()


class PeerFetches:
    """Answers engines' lookups, and has what they miss fetched."""

    def __init__(
        self,
        config: MachineConfig,
        serving: Serving,
        membership: Membership,
        gossip: Gossip,
        coordinator: Coordinator,
        history: History,
        tcp_rate: TcpRate,
        outbox: Outbox,
    ) -> None:
        self._config = config
        self._serving = serving
        self._membership = membership
        self._gossip = gossip
        self._coordinator = coordinator
        self._history = history
        self._tcp_rate = tcp_rate
        self._outbox = outbox
        self._flights: dict[EventId, _Flight] = {}
        self._wishes: dict[ChunkKey, _Wish] = {}
        self.is_leaving = False

    # --- lookups ----------------------------------------------------------------------------------------------------------

    def look_up(self, event: LookupRequested, now: float) -> None:
        """Answer with what is held here, and whether more of it is on its way."""
        namespace = self._serving.namespace_of(event.client)
        prompt = prompt_of(namespace, event.identity, event.tokens)
        held_tokens = self._serving.held_tokens(prompt)
        may_fetch = self._config.peer_fetch and not self.is_leaving and held_tokens < token_count(event.tokens)
        is_fetching = may_fetch and self._is_coming(_Miss(event, namespace, prompt, held_tokens), now)
        self._outbox.answer(event.request, Found(held_tokens, is_fetching))

    def _is_coming(self, miss: _Miss, now: float) -> bool:
        """Whether a flight that is worth waiting for brings more: one that is under way, or else a new one."""
        self._wishes = {name: wish for name, wish in self._wishes.items() if wish.retry_at > now}
        name = chunk_key(miss.prompt.root, miss.prompt.tokens)
        wish = self._wishes.get(name)
        if (wish is None and len(self._wishes) >= WISHES_MAX) or (wish is not None and now >= wish.until):
            return False
        flight = self._flight_with(miss)
        if flight is None:  # also when its own one turns out to bring less than was hoped for
            return (wish is None or not wish.is_flying) and self._start(name, miss, now)
        is_awaited = now < flight.until
        if is_awaited and wish is None:
            self._wishes[name] = _Wish(flight.until, retry_at=flight.until + RETRY_S)
        return is_awaited

    def _flight_with(self, miss: _Miss) -> _Flight | None:
        flights = self._flights.values()
        return next((each for each in flights if each.brings_more(miss.prompt, miss.held_tokens)), None)

    def _start(self, name: ChunkKey, miss: _Miss, now: float) -> bool:
        """Start a flight from the best holder; False when there is none, or none may be started."""
        best = max(self._holders(miss), key=lambda held: self._saved_s(miss, held, now), default=None)
        if best is None or self._saved_s(miss, best, now) <= 0 or len(self._flights) >= FLIGHTS_MAX:
            return False
        old, new = Position(best.instance, best.location), Position(self._config.instance, Location.LOCAL_CPU)
        plan = PlanRequest(
            event_id=self._coordinator.new_event_id(old, new),
            old_position=old,
            new_position=new,
            operation=Operation.COPY,
            selection=Selection.TOKENS,
            tokens=miss.prompt.tokens,
            identity=miss.event.identity,
            model=miss.namespace.model,
            reader=miss.prompt.namespace,
        )
        if self._coordinator.plan(plan, None, now) is not None:
            return False
        until = now + max(LEAST_PATIENCE_S, miss.compute_s(best.num_tokens))
        self._wishes[name] = _Wish(until, retry_at=inf, num_tokens=best.num_tokens)
        self._flights[plan.event_id] = _Flight(plan.event_id, name, miss.prompt, best.num_tokens, until)
        return True

    # --- who has it -------------------------------------------------------------------------------------------------------

    def _holders(self, miss: _Miss) -> list[Held]:
        """Who may have more than is held here.

        The instance that the engine names is asked even if the view shows nothing there: the view may lag, and the engine has
        been told. Without it, or where it can't be reached, the view says who.
        """
        source = miss.event.source
        if source not in (None, self._config.instance) and self._membership.unreachable(source) is None:
            return [Held(source, Location.LOCAL_CPU, token_count(miss.prompt.tokens))]
        records = [each for each in self._membership.records() if each.state.is_living]
        others = [each.instance for each in records if each.instance != self._config.instance]
        found = self._gossip.longest_prefixes([PromptFingerprints(miss.prompt)], others)
        return [held for held in found if held.num_tokens > miss.held_tokens]

    def _saved_s(self, miss: _Miss, held: Held, now: float) -> float:
        """How much sooner the tokens are here by a fetch from a holder than by computing them; 0 or less: not worth it."""
        record = self._membership.record_of(held.instance)
        routes = [] if record is None else routes_between(record, self._membership.me, held.location)
        if not routes:
            return -inf
        is_handoff = isinstance(routes[0], HandoffAddress)
        fetch_s = 0.0 if is_handoff else TCP_SETUP_S + miss.nbytes(held.num_tokens) / self._tcp_rate.bytes_per_s(now)
        return miss.compute_s(held.num_tokens) - fetch_s

    # --- flights ----------------------------------------------------------------------------------------------------------

    def follow(self, now: float) -> None:
        """After each event: learn what flights bring, and which have ended."""
        for flight in list(self._flights.values()):
            record = self._history.get(flight.event_id)
            if record is not None:
                flight.num_tokens = record.num_tokens
            if not self._coordinator.is_planning(flight.event_id) and (record is None or record.state.is_final):
                self._ended(flight, now)

    def _ended(self, flight: _Flight, now: float) -> None:
        del self._flights[flight.event_id]
        wish = self._wishes[flight.wish]
        if self._serving.held_tokens(flight.prompt) >= wish.num_tokens:
            del self._wishes[flight.wish]
        else:
            wish.until, wish.retry_at = now, now + RETRY_S

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        assert len(self._flights) <= FLIGHTS_MAX
        assert len(self._wishes) <= WISHES_MAX
        for flight in self._flights.values():
            assert self._wishes[flight.wish].is_flying, "a flight's prompt may be asked for again"

    def check_at_rest(self) -> None:
        """Assert what must hold when no move is open."""
        assert not self._flights, "a flight never ends"

"""What happens in a round: users move, copy, cancel and pin, engines store and read, and blows fall on nodes."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import httpx2

from p2pkv.core.ids import InstanceId
from p2pkv.core.keys import Fingerprint
from p2pkv.errors import ErrorCode, FailureError, NodeUnreachableError
from sims.chaos.ledger import Ledger
from sims.chaos.nodes import AT, Members
from sims.chaos.prompts import Prompt, filler, is_right

WORKERS = 3
THINK_S = (0.0, 0.06)
KILL_S = (0.2, 3.0)
"""How long an instance is gone."""
STOP_S = (0.3, 9.0)
"""How long one stands still: some are thought dead meanwhile, some not."""
COPIES, HELD_SOURCES, RETRIES = 0.3, 0.8, 0.1
EXPECTED = {
    ErrorCode.UNKNOWN_INSTANCE,  # it has just started, or was dead for too long
    ErrorCode.UNKNOWN_EVENT,  # all who knew it were killed
    ErrorCode.INSTANCE_UNREACHABLE,
    ErrorCode.STORE_FULL,
    ErrorCode.TRANSFER_FAILED,
    ErrorCode.CANCELLED,
    ErrorCode.DEADLINE_EXCEEDED,
}
"""What users are told when nodes are killed and full; anything else is a bug."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that was done: when, in seconds since the round began, and to which chunks; None: to any."""

    at: float
    text: str
    fingerprints: tuple[Fingerprint, ...] | None = None

    def concerns(self, fingerprint: Fingerprint) -> bool:
        """Whether it may have something to do with what became of a chunk."""
        return self.fingerprints is None or fingerprint in self.fingerprints

    def __str__(self) -> str:
        return f"{self.at:7.3f} {self.text}"


class Round:
    """Threads that act until they are told to end.

    Attributes:
        counts: What was done, and how it ended.
        events: Of moves and copies that were asked for.
        journal: What was done, for whoever has to find out why.
        violations: What must not happen, and did.
    """

    def __init__(self, members: Members, ledger: Ledger, guarded: Sequence[Prompt], seed: str) -> None:
        self.counts: Counter[str] = Counter()
        self.events: dict[str, None] = {}
        self.journal: list[Entry] = []
        self.violations: list[str] = []
        self._members = members
        self._names = list(members.all)
        self._ledger = ledger
        self._guarded = guarded
        self._seed = seed
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._began_at = time.monotonic()

    def run(self, seconds: float, kills: int, stops: int) -> None:
        """Have it all happen; afterwards all nodes run."""
        blows = [self._kill] * kills + [self._stop] * stops
        rng = Random(f"{self._seed}:blows")
        plan = sorted((rng.uniform(0.1, 0.8) * seconds, number, blow) for number, blow in enumerate(blows))
        threads = [threading.Thread(target=self._work, args=(f"{self._seed}:{worker}",)) for worker in range(WORKERS)]
        threads += [threading.Thread(target=self._strike, args=(*each, f"{self._seed}:blow")) for each in plan]
        for thread in threads:
            thread.start()
        try:
            self._ends.wait(seconds)
        finally:
            self._ends.set()
            for thread in threads:
                thread.join()

    def _note(self, text: str, fingerprints: tuple[Fingerprint, ...] | None = None) -> None:
        with self._lock:
            self.journal.append(Entry(time.monotonic() - self._began_at, text, fingerprints))

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _violate(self, text: str) -> None:
        self._note(f"VIOLATION {text}")
        with self._lock:
            self.violations.append(text)

    # --- users and engines ------------------------------------------------------------------------------------------------

    def _work(self, seed: str) -> None:
        rng = Random(seed)
        deeds: list[Callable[[Random], None]] = [self._move, self._store, self._read, self._pin, self._cancel, self._move_all]
        while not self._ends.is_set():
            (deed,) = rng.choices(deeds, weights=(8, 4, 6, 1, 1, 0.3))
            try:
                deed(rng)
            except (httpx2.TransportError, NodeUnreachableError):
                self._count("calls that found nobody")
            except FailureError as error:
                self._count(f"stores refused: {error.failure.code}")
                if error.failure.code not in EXPECTED:
                    self._violate(f"{deed.__name__}: {error!r}")
            except Exception as error:  # noqa: BLE001 - whatever it is, it mustn't be
                self._violate(f"{deed.__name__}: {error!r}")
            time.sleep(rng.uniform(*THINK_S))

    def _move(self, rng: Random) -> None:
        prompt = rng.choice(self._guarded)
        is_copy = rng.random() < COPIES
        source, target = self._source(prompt, rng), rng.choice(self._names)
        body = {"tokens": list(prompt.tokens), "copy": is_copy, "idempotency_key": f"{rng.getrandbits(64):x}"}
        fingerprints = prompt.fingerprints(self._members.namespace)
        if not is_copy:
            with self._lock:
                self._ledger.moved(fingerprints, source, target)
        for _ in range(1 + (rng.random() < RETRIES)):
            self._ask_move("copy" if is_copy else "move", source, target, body, rng, fingerprints)

    def _move_all(self, rng: Random) -> None:
        source, target = rng.choice(self._names), rng.choice(self._names)
        with self._lock:
            self._ledger.moved(None, source, target)
        self._ask_move("move of all", source, target, {"all": True}, rng)

    def _source(self, prompt: Prompt, rng: Random) -> InstanceId:
        """Mostly one that holds the prompt, as far as some node knows."""
        if rng.random() < HELD_SOURCES:
            _, found = self._members.call(rng.choice(self._names), "/lookup", tokens=list(prompt.tokens))
            if found["layout_info"]:
                return str(rng.choice(sorted(found["layout_info"])))
        return rng.choice(self._names)

    def _ask_move(
        self,
        what: str,
        source: InstanceId,
        target: InstanceId,
        body: dict[str, object],
        rng: Random,
        fingerprints: tuple[Fingerprint, ...] | None = None,
    ) -> None:
        by, wait_s = rng.choice(self._names), rng.choice([0, 0, 2])
        said = f"{what} from {source} to {target} asked of {by}"
        self._note(said, fingerprints)
        status, answer = self._members.call(
            by, "/move", old_position=[source, AT], new_position=[target, AT], wait_s=wait_s, **body
        )
        self._note(f"{said}: {answer.get('event_id', '')} {answer.get('state') or answer['error']}", fingerprints)
        if "event_id" in answer:
            with self._lock:
                self.events[answer["event_id"]] = None
        self._count(f"{what}: {answer.get('state') or answer['error']}")
        self._check(said, status, answer)

    def _store(self, rng: Random) -> None:
        name, prompt = rng.choice(self._names), filler(rng)
        with self._members.attach(name) as cache:
            cache.store(prompt.tokens, prompt.kv())
        self._count("prompts stored, for nobody")

    def _read(self, rng: Random) -> None:
        name, prompt = rng.choice(self._names), rng.choice(self._guarded)
        with self._members.attach(name) as cache:
            num_tokens, kv = cache.retrieve(prompt.tokens)
        self._count("reads that found something" if num_tokens else "reads that found nothing")
        if kv is not None and not is_right(prompt.tokens, kv):
            self._violate(f"{name} gave wrong bytes for {num_tokens} tokens that begin with {prompt.tokens[:2]}")

    def _pin(self, rng: Random) -> None:
        prompt = filler(rng)
        name = rng.choice(self._names)
        with self._members.attach(name) as cache:
            cache.store(prompt.tokens, prompt.kv())
        body = {"instance_id": name, "location": AT, "tokens": list(prompt.tokens), "ttl_s": rng.uniform(0.1, 4.0)}
        self._check("pin", *self._members.call(rng.choice(self._names), "/pin", **body))
        self._count("prompts pinned for a while")

    def _cancel(self, rng: Random) -> None:
        with self._lock:
            known = list(self.events)[-8:]
        if known:
            state = self._members.cancel(rng.choice(self._names), rng.choice(known))
            self._count(f"cancels: {state}")

    def _check(self, what: str, status: int, answer: dict[str, object]) -> None:
        if status != httpx2.codes.OK and answer.get("error") not in EXPECTED:
            self._violate(f"{what}: {status} {answer}")

    # --- blows ------------------------------------------------------------------------------------------------------------

    def _strike(self, after_s: float, number: int, blow: Callable[[InstanceId, Random], None], seed: str) -> None:
        rng = Random(f"{seed}:{number}")
        name = rng.choice(self._names)
        self._ends.wait(after_s)
        try:
            with self._members.all[name].uses:
                blow(name, rng)
        except Exception as error:  # noqa: BLE001 - whatever it is, it mustn't be
            self._violate(f"{blow.__name__} {name}: {error!r}")

    def _kill(self, name: InstanceId, rng: Random) -> None:
        with self._lock:
            self._ledger.killed(name)
        self._note(f"kill {name}")
        self._members.kill(name)
        self._ends.wait(rng.uniform(*KILL_S))
        self._members.start(name)
        self._note(f"{name} is back")
        self._count("nodes killed")

    def _stop(self, name: InstanceId, rng: Random) -> None:
        self._note(f"stop {name}")
        self._members.stop(name)
        self._ends.wait(rng.uniform(*STOP_S))
        self._members.resume(name)
        self._note(f"{name} goes on")
        self._count("nodes stopped")

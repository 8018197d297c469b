"""How changes spread when members relay each other's logs, round by round: up to tens of thousands of members in bitmaps.

Each member has links to a few others. Every round it draws three of them. An exchange has up to four messages (`relayed`): its
digest, with what it has *learnt of late*; the other's wants, and what that has learnt; the changes wanted there, with its own
wants; the changes wanted here. A member's exchanges in a round follow each other, six in 200 ms, so it wants nothing that one
before has brought, and wants again what was lost. What it names is what it knew when the round began: a change goes one member
further in a round and no more.

A sample of changes is followed, each of another origin, so many new ones a round: a bit for each member and change says whether
it knows. Not modelled: who is alive, rounds that don't begin together, and the repair that finds what was never learnt (the
roots differ): who would need it is counted. That two exchanges cross, so that a change comes twice, isn't either.

Source: push-pull epidemics, Demers et al., "Epidemic Algorithms for Replicated Database Maintenance", 1987.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sims.scale.relayed import Counts

FANOUT = 3
ROUND_S = 0.2
LINKS = 24
"""Of each member. With 8 a change takes a round more among a thousand; with 16 none."""
LATE_ROUNDS = 4
"""So long what was learnt is named in digests. With 3, a tenth of all messages lost and 10,000 members, one in a million never
learnt of a change; with 4 none."""
CHANGES = 512
"""Followed in a run."""
CHANGES_A_ROUND = 32
"""New ones a round at most, in a large cluster; in a small one, one for each ten members."""
PATIENCE_ROUNDS = 40
"""What isn't known to all so long after the last change, never will be."""

Bits = NDArray[np.uint64]
Members = NDArray[np.intp]


@dataclass(slots=True)
class Said:
    """Messages of a run, by what is in each: an entry an exchange, 0 where nothing was sent.

    Attributes:
        digest_heads: In each digest.
        answer_wants: In each answer.
        answer_heads: In each answer.
        back_wants: In each third message.
        back_parts: In each third message.
        last_parts: In each fourth message.
    """

    digest_heads: list[Counts] = field(default_factory=list)
    answer_wants: list[Counts] = field(default_factory=list)
    answer_heads: list[Counts] = field(default_factory=list)
    back_wants: list[Counts] = field(default_factory=list)
    back_parts: list[Counts] = field(default_factory=list)
    last_parts: list[Counts] = field(default_factory=list)


@dataclass(slots=True)
class Spread:
    """What came of a run.

    Attributes:
        nodes: Members.
        round_count: Rounds until all changes were known to all, or nobody spoke of them any more.
        known: How many know each change after each round since it was made: a row for each change, from round 0 on.
        said: All messages.
    """

    nodes: int
    round_count: int
    known: NDArray[np.int64]
    said: Said

    def rounds_until(self, share: float) -> list[float]:
        """For each change that so many members came to know: after how many rounds."""
        wanted = int(np.ceil(share * self.nodes - 1e-9))
        has_enough = self.known >= wanted
        return [float(each) for each in has_enough[has_enough.any(axis=1)].argmax(axis=1)]

    def mean_shares(self) -> list[float]:
        """Which share of all knows a change after each round, in the mean, from round 0 on."""
        shares: list[float] = (self.known.mean(axis=0) / self.nodes).tolist()
        return shares[: 1 + int((self.known.min(axis=0) < self.known.max()).sum())]

    @property
    def learnt_count(self) -> int:
        """How often anyone learnt of a change."""
        return int((self.known[:, -1] - 1).sum())

    @property
    def share_that_learnt(self) -> float:
        """Of those who were to."""
        return self.learnt_count / (len(self.known) * (self.nodes - 1))


def mesh(nodes: int, links: int, rng: np.random.Generator) -> Members:
    """Whom each has a link to, a row each: everyone, if there are so few; else its neighbours in random rings."""
    if nodes <= links + 1:
        return np.array([[other for other in range(nodes) if other != one] for one in range(nodes)], np.intp)
    neighbours = np.empty((nodes, links), np.intp)
    for ring in range(0, links, 2):
        order = rng.permutation(nodes)
        neighbours[order, ring] = np.roll(order, 1)
        neighbours[order, ring + 1] = np.roll(order, -1)
    return neighbours


class Epidemic:
    """A cluster, from the first change until all is known."""

    def __init__(self, nodes: int, rng: np.random.Generator, *, loss: float = 0.0, changes: int = CHANGES) -> None:
        self._nodes, self._rng, self._loss, self._changes = nodes, rng, loss, changes
        self._links = mesh(nodes, LINKS, rng)
        self._known: Bits = np.zeros((nodes, -(-changes // 64)), np.uint64)
        self._learnt_of_late: deque[Bits] = deque(maxlen=LATE_ROUNDS)
        self._made_in: list[int] = []
        self._said = Said()

    def run(self) -> Spread:
        """Let changes happen and spread."""
        a_round = min(CHANGES_A_ROUND, max(1, self._nodes // 10))
        history: list[NDArray[np.int64]] = []
        round_count = 0
        while True:
            made = self._make(min(a_round, self._changes - len(self._made_in)), round_count)
            if self._learnt_of_late:
                self._learnt_of_late[-1] |= made
            else:
                self._learnt_of_late.append(made)
            history.append(self._counts())
            is_over = len(self._made_in) == self._changes and (history[-1] == self._nodes).all()
            if is_over or round_count - self._made_in[-1] > PATIENCE_ROUNDS:
                break
            self._learnt_of_late.append(self._exchange())
            round_count += 1
        known = np.stack(history, axis=1)
        since = np.array(self._made_in)[:, None] + np.arange(known.shape[1])
        known = np.take_along_axis(known, np.minimum(since, known.shape[1] - 1), axis=1)
        return Spread(self._nodes, round_count, known, self._said)

    def _make(self, count: int, round_index: int) -> Bits:
        """So many changes, each by another member."""
        made = np.zeros_like(self._known)
        for origin in self._rng.choice(self._nodes, count, replace=False).tolist():
            number = len(self._made_in)
            made[origin, number // 64] |= np.uint64(1 << number % 64)
            self._made_in.append(round_index)
        self._known |= made
        return made

    def _counts(self) -> NDArray[np.int64]:
        """How many know each change."""
        bits = np.unpackbits(self._known.view(np.uint8), axis=1, bitorder="little", count=self._changes)
        counts: NDArray[np.int64] = bits.sum(axis=0, dtype=np.int64)
        return counts

    def _arrives(self, count: int) -> NDArray[np.bool_]:
        return self._rng.random(count) >= self._loss

    def _exchange(self) -> Bits:
        """One round; returns what each learnt."""
        late = np.bitwise_or.reduce(list(self._learnt_of_late))
        ones = np.repeat(np.arange(self._nodes), FANOUT)
        others = self._rng.permuted(self._links, axis=1)[:, :FANOUT].ravel()
        mine, theirs = late[ones], late[others]
        is_heard = self._arrives(len(ones))
        is_answered = is_heard & self._arrives(len(ones))
        has_arrived = is_answered & self._arrives(len(ones))
        has_ended = has_arrived & self._arrives(len(ones))
        knows = self._known.copy()
        wants = _learn(knows, others, _where(is_heard, mine), has_arrived)
        offers = _where(is_heard, theirs & ~mine)
        back_wants = _learn(knows, ones, _where(is_answered, offers), has_ended)
        learnt = knows & ~self._known
        self._known = knows
        said = self._said
        said.digest_heads.append(_count(mine))
        said.answer_wants.append(_count(wants))
        said.answer_heads.append(_count(offers))
        said.back_wants.append(_count(back_wants))
        said.back_parts.append(_count(_where(is_answered, wants)))
        said.last_parts.append(_count(_where(has_arrived, back_wants)))
        return learnt


def _where(is_so: NDArray[np.bool_], bits: Bits) -> Bits:
    """Nothing where it isn't so."""
    return np.where(is_so[:, None], bits, np.uint64(0))


def _learn(knows: Bits, members: Members, named: Bits, arrives: NDArray[np.bool_]) -> Bits:
    """What members want of what is named to them, one exchange after another; from then on they know what `arrives`."""
    wants = np.zeros_like(named)
    for of_each in _one_each(members):
        at = members[of_each]
        wants[of_each] = named[of_each] & ~knows[at]
        knows[at] |= _where(arrives[of_each], wants[of_each])
    return wants


def _one_each(members: Members) -> list[Members]:
    """All places in `members`, cut so that no part has a member twice: the first of each, the second of each, ..."""
    order = np.argsort(members, kind="stable")
    ordered = members[order]
    ranks = np.arange(len(ordered)) - ordered.searchsorted(ordered)
    by_rank = order[np.argsort(ranks, kind="stable")]
    return np.split(by_rank, np.bincount(ranks).cumsum()[:-1]) if len(ordered) else []


def _count(bits: Bits) -> Counts:
    counts: Counts = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
    return counts

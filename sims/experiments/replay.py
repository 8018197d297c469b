"""A real service's requests over many instances: what they tell each other of it, and how much of each prompt someone holds.

Each instance stores what it computes and forgets the coldest for it. Its changes go into a real inventory log and from there,
`FLUSH_S` after the first of them, in real messages to each other instance, as in a full mesh. One instance's real view takes
them all in, and at the end is to say what all the others hold. Nothing is lost, and computing takes no time.

Requests go round robin, or to the instance that their second chunk draws (`sims/scale/rendezvous`): the first one is the same
in nearly all of the trace, the second one tells conversations apart.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

import numpy as np

from p2pkv.core.directory import Directory
from p2pkv.core.gossip import FLUSH_S
from p2pkv.core.inventory import InventoryView
from p2pkv.core.messages import CHANGE_NBYTES, InventoryDelta
from p2pkv.core.rows import ROW_NBYTES, entries_in
from p2pkv.wire.codec import peer_codec
from sims.errors import ExperimentError
from sims.experiments.convergence import OVERHEAD
from sims.experiments.figures import Figure, Findings
from sims.scale.rendezvous import keepers
from sims.trace import CHUNK_TOKENS, GENERATION, Instance, Request, hashed, read_trace

STORE_CHUNKS = 1024
"""Of each instance: 64 GiB at 128 KiB a token (Llama-3.1-8B in bfloat16)."""
OBSERVER = 0
Route = Callable[[Sequence[Request], int], list[int]]


def round_robin(requests: Sequence[Request], instances: int) -> list[int]:
    """Which instance gets each request: one after another."""
    return [index % instances for index in range(len(requests))]


def prefix_affine(requests: Sequence[Request], instances: int) -> list[int]:
    """Which instance gets each request: the same for all of a conversation."""
    firsts = [hashed(f"prompt {request.chunk_ids[:2][-1]}") for request in requests]
    names = [hashed(f"instance {index}") for index in range(instances)]
    drawn: list[int] = keepers(np.array(firsts, np.uint64), np.array(names, np.uint64), 1)[:, 0].tolist()
    return drawn


ROUTES: dict[str, Route] = {"round robin": round_robin, "prefix-affine": prefix_affine}


def replay(trace: Path, sizes: Sequence[int]) -> Findings:
    """Replay a trace over so many instances, with each way of spreading its requests.

    Raises:
        ExperimentError: It is no trace.
    """
    requests = read_trace(trace)
    over_s = requests[-1].at - requests[0].at
    if not over_s:
        raise ExperimentError(f"all requests of {trace} come at once")
    about = f"{len(requests):,} requests in {over_s:,.0f} s, {STORE_CHUNKS:,} chunks of {CHUNK_TOKENS} tokens an instance"
    found = Findings("replay", max(sizes), 0, about=about)
    total = sum(request.tokens for request in requests)
    found.figures.append(Figure("hits of one cache that never forgets", 100 * _endless_hits(requests) / total, "%"))
    for instances in sizes:
        for name, route in ROUTES.items():
            served = Served(instances, STORE_CHUNKS)
            served.run(requests, route(requests, instances))
            found.figures += _figures(f"{instances} instances, {name}", served, over_s, total)
    return found


def _endless_hits(requests: Sequence[Request]) -> int:
    """Tokens."""
    endless = Instance(sum(len(request.chunk_ids) for request in requests))
    hit_tokens = 0
    for request in requests:
        hit_tokens += request.tokens_of(endless.prefix_of(request.chunk_ids))
        endless.store(request)
    return hit_tokens


class Served:
    """Instances that serve requests, and what they tell each other.

    Attributes:
        instances: All of them.
        request_counts: Requests that each got.
        sent_nbytes: What each has sent to each one of the others.
        message_count: Messages from one to all others, each counted once.
        delivered: What one that gets all messages has got in each second, in bytes.
        local_tokens: Prompts' tokens that were held where they went.
        anywhere_tokens: Prompts' tokens that were held by the instance with the longest prefix.
        directory: What the first instance knows of the others.
        views: Its views, one for each instance; its own stays empty.
    """

    def __init__(self, instances: int, capacity: int) -> None:
        self.instances = [Instance(capacity) for _ in range(instances)]
        self.request_counts: Counter[int] = Counter()
        self.sent_nbytes: Counter[int] = Counter()
        self.message_count = 0
        self.delivered: Counter[int] = Counter()
        self.local_tokens = self.anywhere_tokens = 0
        self.directory = Directory()
        self.views = [
            InventoryView(GENERATION, self.directory.rows, self.directory.holder(str(index))) for index in range(instances)
        ]
        self._sent_sequences = [0] * instances
        self._flush_at = [inf] * instances
        self._holders: defaultdict[int, int] = defaultdict(int)
        """Of each chunk: a bit for each instance."""

    def run(self, requests: Sequence[Request], route: Sequence[int]) -> None:
        """Serve requests, each where `route` sends it."""
        for request, index in zip(requests, route, strict=True):
            if request.at >= self._flush_at[index]:
                self._flush(index)
            self._serve(request, index)
        for index in range(len(self.instances)):
            self._flush(index)

    def _serve(self, request: Request, index: int) -> None:
        instance = self.instances[index]
        self.request_counts[index] += 1
        self.local_tokens += request.tokens_of(instance.prefix_of(request.chunk_ids))
        self.anywhere_tokens += request.tokens_of(self._longest_prefix(request.chunk_ids))
        came, went = instance.store(request)
        for each in came:
            self._holders[each] |= 1 << index
        for each in went:
            self._holders[each] &= ~(1 << index)
        if (came or went) and self._flush_at[index] == inf:
            self._flush_at[index] = request.at + FLUSH_S

    def _longest_prefix(self, chunk_ids: Sequence[int]) -> int:
        """Of a prompt's first chunks, how many the one holds that holds the most of them."""
        holders = -1
        for count, each in enumerate(chunk_ids):
            holders &= self._holders[each]
            if not holders:
                return count
        return len(chunk_ids)

    def _flush(self, index: int) -> None:
        """Tell all others what has changed since the last time."""
        flushed_at, self._flush_at[index] = self._flush_at[index], inf
        inventory = self.instances[index].inventory
        deltas = inventory.tail(GENERATION, self._sent_sequences[index])
        assert deltas is not None, "a log has room for what one request changes"
        self._sent_sequences[index] = inventory.sequence
        for delta in deltas:
            message = peer_codec().encode(delta)
            self.message_count += 1
            self.sent_nbytes[index] += len(message)
            self.delivered[int(flushed_at)] += len(message)
            if index != OBSERVER:
                arrived = peer_codec().decode(message)
                assert isinstance(arrived, InventoryDelta)
                assert self.views[index].apply_delta(arrived)

    def is_view_right(self) -> bool:
        """Whether the first instance's view is what all the others hold."""
        for index, instance in enumerate(self.instances):
            seen = entries_in(*self.directory.rows.of(self.directory.holder(str(index))))
            if index != OBSERVER and set(seen) != set(instance.inventory.entries):
                return False
        return True


def _figures(name: str, served: Served, over_s: float, total_tokens: int) -> list[Figure]:
    count = len(served.instances)
    changes = [instance.inventory.sequence for instance in served.instances]
    rows = sum(view.entry_count for view in served.views)
    to_each = sum(served.sent_nbytes.values())
    return [
        Figure(f"{name}: hits at the instance itself", 100 * served.local_tokens / total_tokens, "%"),
        Figure(f"{name}: hits anywhere", 100 * served.anywhere_tokens / total_tokens, "%"),
        Figure(
            f"{name}: busiest instance's requests, times the mean",
            max(served.request_counts.values()) * count / served.request_counts.total(),
        ),
        Figure(f"{name}: inventory changes a second and node", sum(changes) / count / over_s),
        Figure(f"{name}: inventory changes a second and node, most", max(changes) / over_s),
        Figure(f"{name}: changes a message", sum(changes) / served.message_count),
        Figure(f"{name}: bytes a second and node, out and in", to_each * (count - 1) / count / over_s, "B"),
        Figure(f"{name}: bytes a second out, most", max(served.sent_nbytes.values()) * (count - 1) / over_s, "B"),
        Figure(f"{name}: bytes in, in the busiest second", max(served.delivered.values()), "B"),
        Figure(f"{name}: times the payload", to_each / (sum(changes) * CHANGE_NBYTES), at_most=OVERHEAD),
        Figure(f"{name}: rows in one's view", rows),
        Figure(f"{name}: bytes of one's view", rows * ROW_NBYTES, "B"),
        Figure(f"{name}: views that are wrong at the end", 0 if served.is_view_right() else 1, at_most=0.0),
    ]

"""`agreement`: 25 real nodes with 10,000 chunks each: from the last one's join until all know what all hold; their memory.

Chunks are a token long and take a page. All nodes but the last are full, and agree, when that one starts; it stores its own as
soon as it is ready. A node agrees on an owner when it finds what that one stored last, as an inventory comes in the order in
which it was changed, and says that its view of all members is complete. In the end each also lists all that another one holds.
"""

import time
from collections.abc import Sequence
from itertools import product

import httpx2
import torch

from p2pkv.engines import EngineCache, KVLayout
from sims.bench.processes import NodeProcess, open_bench, resident_nbytes
from sims.bench.report import Row

NODES, CHUNKS = 25, 10_000
PROMPT_CHUNKS = 100
"""Of one prompt. A longer one would take the node longer to store, which isn't what is measured."""
LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32")
AGREE_S = 120.0
"""They agree by then, or something is wrong."""
POLL_S = 0.05
REQUEST_S = 30.0


def run(*, nodes: int = NODES, chunks: int = CHUNKS) -> Sequence[Row]:
    """Start and fill all but one; then let the last one join and store."""
    owners = [_Owner(f"m{index:02}", index, chunks) for index in range(nodes)]
    torch.zeros(1)  # the first tensor takes time that no node shall be charged with
    with open_bench() as bench, httpx2.Client(trust_env=False, timeout=REQUEST_S) as client:
        running: list[NodeProcess] = []
        for owner in owners[:-1]:
            running.append(bench.start(owner.name, chunk_size=1, max_local_cpu_size=1))
            owner.store(running[-1])
        for owner in owners[:-1]:
            owner.wait_known(client, running)
        running.append(bench.start(owners[-1].name, chunk_size=1, max_local_cpu_size=1))
        ready_at = time.perf_counter()
        owners[-1].store(running[-1])
        stored_at = time.perf_counter()
        owners[-1].wait_known(client, running)
        for owner in owners:
            owner.wait_known(client, running[-1:])
        agreed_at = time.perf_counter()
        for node, owner in product(running, owners):
            assert owner.is_known(client, node), f"{node.instance} doesn't know all that {owner.name} holds"
        for node, owner in zip(running, owners[1:] + owners[:1], strict=True):
            assert owner.listed_count(client, node) == chunks, f"{node.instance} doesn't list all that {owner.name} holds"
        memory = tuple(resident_nbytes(node) / 1e6 for node in running)
    return (
        Row(f"the last of {nodes} joins, until all agree on {nodes * chunks:,} entries", "s", (agreed_at - ready_at,), "<= 10"),
        Row(f"... of that, until it has stored its own {chunks:,}", "s", (stored_at - ready_at,)),
        Row("resident memory of a node (anonymous and file pages, without chunks)", "MB", memory),
    )


class _Owner:
    """An instance, and the prompts that it stores: no two alike, nor like another's."""

    def __init__(self, name: str, index: int, chunks: int) -> None:
        self.name = name
        starts = range(index * chunks, (index + 1) * chunks, PROMPT_CHUNKS)
        self._prompts = [list(range(start, start + PROMPT_CHUNKS)) for start in starts]

    def store(self, node: NodeProcess) -> None:
        """Have this instance's node hold them all."""
        with EngineCache.attach(node.config, model="bench", layout=LAYOUT, autostart=False) as cache:
            for tokens in self._prompts:
                assert cache.store(tokens, torch.zeros(LAYOUT.shape(len(tokens)))) == len(tokens)

    def is_known(self, client: httpx2.Client, node: NodeProcess) -> bool:
        """Whether a node knows the last that this one has stored, and lacks nothing that it knows of."""
        answer = client.post(f"{node.http}/lookup", json={"tokens": self._prompts[-1]}).raise_for_status().json()
        _, held = answer["layout_info"].get(self.name, ("", 0))
        return answer["complete"] is True and held == PROMPT_CHUNKS

    def wait_known(self, client: httpx2.Client, nodes: Sequence[NodeProcess]) -> None:
        """Wait until all of `nodes` know it."""
        ends_at = time.perf_counter() + AGREE_S
        for node in nodes:
            while not self.is_known(client, node):
                if time.perf_counter() > ends_at:
                    raise SystemExit(f"{node.instance} doesn't know within {AGREE_S:g} s what {self.name} holds")
                time.sleep(POLL_S)

    def listed_count(self, client: httpx2.Client, node: NodeProcess) -> int:
        """How many chunks a node lists of this one."""
        count, cursor = 0, None
        while True:
            query = {"instance": self.name} | ({} if cursor is None else {"cursor": cursor})
            page = client.get(f"{node.http}/inventory", params=query).raise_for_status().json()
            count, cursor = count + len(page["items"]), page["next"]
            if cursor is None:
                return count

"""The chunks of `p2pkv bench`: two prompts of a model that nobody else has, stored as an engine does, and cleared again.

An instance remembers the models and layouts that it has served, 64 of them: so the model is always the same one of its source,
and each prompt has a salt of its own. Importing this loads torch.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from p2pkv.commands.bench_ends import POLL_S, VIEW_S, End, check_room
from p2pkv.commands.client import NodeClient, Reply, open_client
from p2pkv.commands.top_view import UNFINISHED, size_text
from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.core.ids import Location
from p2pkv.core.keys import MAX_TOKENS, Identity
from p2pkv.engines import EngineCache, KVLayout
from p2pkv.errors import ConfigError, NodeUnreachableError, P2pkvError
from p2pkv.http_paths import event_path
from p2pkv.rendezvous import is_living
from p2pkv.store.memory import page_rounded

SMALL_TOKENS = 12
SMALL_LAYOUT = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="float32")
"""Of the demo's small Llama: 4 KiB a token."""
HEAD_DIM = 128
PIECE_NBYTES = 256 * 2**20
"""Stored at a time: a fraction of a second, and then a signal is looked for."""
SETTLE_S = 6.0
"""What a move under way gets to end before its chunks are cleared: longer than it takes to find out that an end is dead."""
CLEAR_S = 3.0
"""What a node's answer may take then: one that stands still shall not keep the chunks at the other end."""
REPLY_S = 5.0
"""What the engine's socket may take for each answer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is moved.

    Attributes:
        tokens: Its token ids.
        salt: Its own.
        layout: Of its KV.
        charged_nbytes: What it counts against a limit, at most.
    """

    tokens: list[int]
    salt: str
    layout: KVLayout
    charged_nbytes: int


class OwnChunks:
    """Two prompts at the source: one of many large chunks, one of a dozen tokens.

    Attributes:
        source: Where they are stored.
        target: The other end.
        model: Whose they are.
        large, small: The prompts.
        chunk_nbytes: Of one of the large chunks.
    """

    def __init__(self, source: End, target: End, chunk_count: int, chunk_nbytes: int) -> None:
        self.source, self.target = source, target
        self.model = f"p2pkv-bench/{source.instance}"
        with self._attached(source, SMALL_LAYOUT) as cache:
            chunk_size = cache.namespace.chunk_size
        if chunk_count * chunk_size > MAX_TOKENS:
            raise ConfigError(f"--chunks is at most {MAX_TOKENS // chunk_size} here: a prompt has at most {MAX_TOKENS} tokens")
        layout = _layout_of(chunk_nbytes, chunk_size)
        self.chunk_nbytes = 2 * layout.kv_heads * layout.head_dim * chunk_size
        self.large = _prompt(chunk_count * chunk_size, layout, chunk_count * page_rounded(self.chunk_nbytes))
        # Where chunks are short it takes several, each with a page that it doesn't fill.
        small_nbytes = SMALL_TOKENS * (4096 + PAGE_NBYTES)
        self.small = _prompt(SMALL_TOKENS, SMALL_LAYOUT, small_nbytes)

    @contextmanager
    def _attached(self, end: End, layout: KVLayout) -> Iterator[EngineCache]:
        assert end.local is not None, "only who is on this host is attached to"
        with EngineCache.attach(end.local.config, model=self.model, layout=layout, autostart=False, reply_s=REPLY_S) as cache:
            yield cache

    def store(self) -> Iterator[int]:
        """Have the source hold both prompts; yields the bytes that are stored, piece by piece.

        Raises:
            P2pkvError: There was no room, though there had been.
        """
        for prompt in (self.small, self.large):
            with self._attached(self.source, prompt.layout) as cache:
                yield from self._store(cache, prompt)

    def _store(self, cache: EngineCache, prompt: Prompt) -> Iterator[int]:
        layout, chunk_size = prompt.layout, cache.namespace.chunk_size
        # One token's KV for all of them: nothing looks at it, and the memory that is filled is the node's.
        row = torch.rand(layout.shape(1)).mul(100).to(layout.torch_dtype)
        token_nbytes = row.numel() * row.element_size()
        step = chunk_size * max(1, PIECE_NBYTES // (token_nbytes * chunk_size))
        for start in range(0, len(prompt.tokens), step):
            tokens = prompt.tokens[: start + step]
            kv = row.expand(layout.shape(len(tokens) - start))
            if cache.store(tokens, kv, Identity(cache_salt=prompt.salt), start=start) < len(tokens):
                raise P2pkvError(f"{self.source.instance} kept less than it was given: somebody else has filled it meanwhile")
            yield (len(tokens) - start) * token_nbytes

    # --- clearing ---------------------------------------------------------------------------------------------------------

    def forget(self, end: End) -> None:
        """Have an end on this host forget this model: all that this bench has there, or that one which was killed has left.

        Raises:
            NodeUnreachableError: The node is going, or stands still.
        """
        if end.local is None or not is_living(end.local.place):
            return
        for prompt in (self.small, self.large):
            with self._attached(end, prompt.layout) as cache:
                while cache.clear():
                    pass

    def clear(self, asked: NodeClient, open_event: str | None, environ: Mapping[str, str]) -> str | None:
        """Clear both prompts at both ends, once the moves of them have ended.

        Args:
            asked: The node that was asked for the moves; it may be gone.
            open_event: A move that may still go on.
            environ: What nodes want to be shown.

        Returns:
            What is left, and where; None when nothing is.
        """
        with ExitStack() as stack:
            urls = (asked.url, self.source.http, self.target.http)
            clients = [stack.enter_context(open_client(url, environ, answer_s=CLEAR_S)) for url in urls]
            if open_event is not None:
                for client in clients:
                    _try(client, "DELETE", event_path(open_event))
            _within(SETTLE_S, lambda: not any(map(self._is_moving, clients)))
            troubles = []
            try:
                self._bring_home(clients)
            except P2pkvError as error:  # if anything is there still, the lookup says so
                troubles.append(str(error))
            stuck = [end.instance for end in (self.target, self.source) if not self._is_forgotten(end, troubles)]
            return self._left(clients, stuck, troubles)

    def _is_forgotten(self, end: End, troubles: list[str]) -> bool:
        """Have an end forget; False, with the reason among `troubles`, when its node lives and yet doesn't do it."""
        try:
            self.forget(end)
        except P2pkvError as error:
            troubles.append(str(error))
            return end.local is None or not is_living(end.local.place)
        return True

    def _is_moving(self, client: NodeClient) -> bool:
        """Whether a node knows of a move under way that may be one of these."""
        reply = _try(client, "GET", "/events")
        ends, lengths = {self.source.instance, self.target.instance}, (len(self.large.tokens), len(self.small.tokens))
        return reply is not None and any(
            event["state"] in UNFINISHED
            and {event["old_position"][0], event["new_position"][0]} == ends
            and event["num_tokens"] in lengths
            for event in reply.body["events"]
        )

    def _bring_home(self, clients: list[NodeClient]) -> None:
        """Move back what is at a target on another host: only an engine there could clear it and nothing else."""
        if self.target.local is not None:
            return
        for prompt in (self.small, self.large):
            client = next((each for each in clients if self.target.instance in self._holders(each, prompt)), None)
            if client is None:
                continue
            check_room(client, self.source, prompt.charged_nbytes)
            body = {**self.move_body(prompt, self.target, self.source), "wait_s": 0}
            answer = client.ask("POST", "/move", body)
            while answer["state"] in UNFINISHED:  # a move ends by its own deadline, if by nothing else
                time.sleep(POLL_S)
                answer = client.ask("GET", event_path(answer["event_id"]))

    def _left(self, clients: list[NodeClient], stuck: list[str], troubles: list[str]) -> str | None:
        def holders() -> dict[str, int]:
            found: dict[str, int] = {}
            for client in clients:
                for prompt in (self.small, self.large):
                    found |= self._holders(client, prompt)
            return found

        _within(VIEW_S, lambda: not holders())
        where = [f"{tokens} tokens at {instance}" for instance, tokens in holders().items()]
        where += [f"what {instance} has" for instance in stuck]
        if not where:
            return None
        why = f" ({'; '.join(troubles)})" if troubles else ""
        return (
            f"left behind: {', '.join(where)} of the model {self.model}{why}. "
            f"It goes when room is needed, or with the next bench of these sizes from {self.source.instance}."
        )

    def _holders(self, client: NodeClient, prompt: Prompt) -> dict[str, int]:
        reply = _try(client, "POST", "/lookup", self.lookup_body(prompt))
        return {} if reply is None else {instance: held[1] for instance, held in reply.body["layout_info"].items()}

    # --- requests ---------------------------------------------------------------------------------------------------------

    def lookup_body(self, prompt: Prompt) -> dict[str, Any]:
        """What `/lookup` takes."""
        return {"tokens": prompt.tokens, "model": self.model, "cache_salt": prompt.salt}

    def move_body(self, prompt: Prompt, old: End, new: End) -> dict[str, Any]:
        """What `/move` takes."""
        positions = {"old_position": [old.instance, Location.LOCAL_CPU], "new_position": [new.instance, Location.LOCAL_CPU]}
        return {**positions, **self.lookup_body(prompt)}


def _prompt(token_count: int, layout: KVLayout, charged_nbytes: int) -> Prompt:
    return Prompt(list(range(token_count)), secrets.token_hex(8), layout, charged_nbytes)


def _layout_of(chunk_nbytes: int, chunk_size: int) -> KVLayout:
    """One whose chunks have `chunk_nbytes`, as near from below as whole heads allow.

    Raises:
        ConfigError: A chunk can't be so small or so large.
    """
    plane_nbytes = chunk_nbytes // (2 * chunk_size)
    head_dim = min(HEAD_DIM, plane_nbytes)
    if not 1 <= plane_nbytes <= HEAD_DIM * 65_536:
        least, most = size_text(2 * chunk_size), size_text(2 * chunk_size * HEAD_DIM * 65_536)
        raise ConfigError(f"--chunk-size is from {least} to {most} here: a chunk has {chunk_size} tokens")
    return KVLayout(layers=1, kv_heads=plane_nbytes // head_dim, head_dim=head_dim, dtype="uint8")


def _try(client: NodeClient, method: str, path: str, body: Mapping[str, object] | None = None) -> Reply | None:
    """The answer of a node that may be gone; None when it is, or refuses."""
    try:
        reply = client.call(method, path, body)
    except NodeUnreachableError:
        return None
    return reply if reply.is_success else None


def _within(seconds: float, is_true: Callable[[], bool]) -> None:
    """Wait until it is true, but no longer."""
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(POLL_S)

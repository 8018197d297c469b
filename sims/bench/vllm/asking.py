"""Prompts, and what an engine answers to them, piece by piece with the time of each."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import pairwise
from random import Random

from p2pkv.engines.reference.model import VOCABULARY_SIZE
from sims.bench.vllm.engines import MODEL, Engine

FIRST_TOKEN = 256
"""From here on a token is a piece of a word; before it are the special ones and single bytes."""
ANSWER_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer.

    Attributes:
        asked_at: When the request was sent, in seconds of `perf_counter`.
        came_at: When each of its pieces came; a piece is a token, unless the client lags.
        tokens: All of it.
    """

    asked_at: float
    came_at: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def first_token_s(self) -> float:
        """From the request to the first piece."""
        return self.came_at[0] - self.asked_at

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece and the next."""
        return [later - earlier for earlier, later in pairwise(self.came_at)]


def random_tokens(count: int, seed: str) -> list[int]:
    """Tokens that depend on the seed alone; two seeds share no more than a few by chance."""
    rng = Random(seed)
    return [rng.randrange(FIRST_TOKEN, VOCABULARY_SIZE) for _ in range(count)]


def ask(engine: Engine, prompt: Sequence[int], answer_tokens: int) -> Answer:
    """Have `engine` answer greedily with exactly so many tokens."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    connection = HTTPConnection("127.0.0.1", engine.port, timeout=ANSWER_S)
    asked_at = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    came_at, pieces = [], []
    while line := response.readline():  # what takes time is done once all has come
        if line.startswith(b"data: {"):
            came_at.append(time.perf_counter())
            pieces.append(line)
    connection.close()
    assert response.status == 200, response.status
    tokens = [token for piece in pieces for token in json.loads(piece.removeprefix(b"data: "))["choices"][0]["token_ids"]]
    assert len(tokens) == answer_tokens, f"{len(tokens)} tokens came instead of {answer_tokens}"
    return Answer(asked_at, tuple(came_at), tuple(tokens))


def ask_all(requests: Sequence[Callable[[], Answer]], concurrency: int) -> tuple[list[Answer], float]:
    """Make the requests in their order, so many at a time; the answers, and the seconds that it took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as threads:
        answers = list(threads.map(lambda request: request(), requests))
    return answers, time.perf_counter() - began

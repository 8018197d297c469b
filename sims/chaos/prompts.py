"""Prompts whose KV can be told from any other's: the bytes of a token follow from the token and where it stands."""

from dataclasses import dataclass
from random import Random

import torch

from p2pkv.core.keys import (
    TOKEN_NBYTES,
    Fingerprint,
    Identity,
    Namespace,
    chunk_key,
    fingerprint,
    full_chunk_keys,
    pack_tokens,
    root_key,
)
from p2pkv.engines import KVLayout

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32", planes=2)
"""A KiB a token."""
CHUNK_SIZE = 16
FAMILIES = 5
TOKENS_MAX = 2**31


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids; the chunks of a guarded one are in the ledger."""

    tokens: tuple[int, ...]

    def kv(self) -> torch.Tensor:
        """What an engine stores of it."""
        return kv_of(self.tokens)

    def fingerprints(self, namespace: Namespace) -> tuple[Fingerprint, ...]:
        """Of its chunks, prefix first, the partly filled last one included."""
        packed = pack_tokens(self.tokens)
        root = root_key(namespace, Identity())
        keys = full_chunk_keys(root, packed, namespace.chunk_size)
        tail = packed[len(keys) * namespace.chunk_size * TOKEN_NBYTES :]
        if tail:
            keys.append(chunk_key(keys[-1] if keys else root, tail))
        return tuple(map(fingerprint, keys))


def kv_of(tokens: tuple[int, ...]) -> torch.Tensor:
    """`[layers, planes, tokens, kv_heads, head_dim]`, float32 of any bits: as integers, they follow from token and place."""
    ids = torch.tensor(tokens, dtype=torch.int64)
    places = torch.arange(len(tokens), dtype=torch.int64)
    of_token = (ids * 2_654_435_761 + places * 40_503) % TOKENS_MAX
    shape = LAYOUT.shape(len(tokens))
    layers = torch.arange(shape[0] * shape[1], dtype=torch.int64).reshape(shape[0], shape[1], 1, 1, 1)
    return (
        ((of_token.reshape(1, 1, -1, 1, 1) + layers) % TOKENS_MAX)
        .to(torch.int32)
        .expand(shape)
        .contiguous()
        .view(torch.float32)
    )


def is_right(tokens: tuple[int, ...], kv: torch.Tensor) -> bool:
    """Whether `kv` is that of the first tokens, bit by bit."""
    held = kv.shape[2]
    return torch.equal(kv.contiguous().view(torch.int32), kv_of(tokens[:held]).view(torch.int32))


def guarded_prompts(count: int, rng: Random) -> list[Prompt]:
    """Prompts of 1 to 20 chunks, in families that share a beginning."""
    beginnings = [_random_tokens(rng.randint(1, 6 * CHUNK_SIZE), rng) for _ in range(FAMILIES)]
    return [
        Prompt(beginnings[number % FAMILIES] + _random_tokens(rng.randint(1, 14 * CHUNK_SIZE), rng)) for number in range(count)
    ]


def filler(rng: Random) -> Prompt:
    """A prompt that nobody needs."""
    return Prompt(_random_tokens(rng.randint(10 * CHUNK_SIZE, 60 * CHUNK_SIZE), rng))


def _random_tokens(count: int, rng: Random) -> tuple[int, ...]:
    return tuple(rng.randrange(TOKENS_MAX) for _ in range(count))

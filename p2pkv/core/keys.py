"""Chunk keys: what makes two chunks of KV cache the same.

A *namespace* is what makes two caches interchangeable; a request adds its own *identity*. Both are encoded typed and
length-prefixed, so that no two meanings share an encoding, and digested into the *root*. From there a key is a chain:

    key = blake2b-128(parent key ‖ tokens as little-endian int32)        the first parent is the root

so a key stands for all tokens up to its chunk's end. The same on every machine and in every process: nothing here depends on
`PYTHONHASHSEED`, byte order or word size. `HASH_VERSION` is part of the namespace; change it with any change of this file that
changes a key, and give `tests/core/test_keys.py` new vectors.

Not decided here: what is stored, or for how long.
"""

import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from sys import byteorder
from typing import Annotated

from annotated_types import Ge, Le, Len

HASH_VERSION = 1
KEY_NBYTES = 16
TOKEN_NBYTES = 4
MAX_TOKENS = 1_048_576
MAX_TOKEN_ID = 2**31 - 1

ChunkKey = Annotated[bytes, Len(KEY_NBYTES, KEY_NBYTES)]
Fingerprint = Annotated[int, Ge(0), Le(2**64 - 1)]
"""The first 8 bytes of a chunk key, big-endian: what gossip carries."""
TokenBytes = Annotated[bytes, Len(0, MAX_TOKENS * TOKEN_NBYTES)]
"""Token ids as consecutive little-endian int32."""

DTYPE_NBYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
DtypeName = Annotated[str, Len(1, 32)]


@dataclass(frozen=True, slots=True)
class Namespace:
    """What makes two caches interchangeable.

    Attributes:
        model: The model's name, as engines and users say it.
        weights: Digest of the weights, or the operator's `cache_epoch` as text.
        dtype: Of the KV cache, one of `DTYPE_NBYTES`.
        layers: Layers of the whole model.
        planes: 2 for keys and values, 1 for MLA's joint latent.
        kv_heads: KV heads of the whole model, over all workers.
        head_dim: Elements of a head.
        chunk_size: Tokens in a full chunk.
        world_size: Tensor-parallel workers; each holds one shard, `kv_heads / world_size` heads.
        layout_version: Of the payload, today 1: `[layers, planes, tokens, kv_heads, head_dim]`, C order.
        hash_version: Of the key chain.
    """

    model: Annotated[str, Len(1, 512)]
    weights: Annotated[str, Len(0, 128)]
    dtype: DtypeName
    layers: Annotated[int, Ge(1), Le(4096)]
    planes: Annotated[int, Ge(1), Le(2)]
    kv_heads: Annotated[int, Ge(1), Le(65536)]
    head_dim: Annotated[int, Ge(1), Le(65536)]
    chunk_size: Annotated[int, Ge(1), Le(65536)]
    world_size: Annotated[int, Ge(1), Le(1024)]
    layout_version: Annotated[int, Ge(1), Le(65535)] = 1
    hash_version: Annotated[int, Ge(1), Le(65535)] = HASH_VERSION

    def problem(self) -> str | None:
        """Why no engine can use this namespace; None when it can be."""
        if self.dtype not in DTYPE_NBYTES:
            return f"dtype {self.dtype!r} is unknown; known are {', '.join(DTYPE_NBYTES)}"
        if self.kv_heads % self.world_size and self.planes == 2:
            return f"{self.kv_heads} KV heads can't be shared out to {self.world_size} workers evenly"
        if self.hash_version != HASH_VERSION:
            return f"its keys are made by hash version {self.hash_version}, this node's by {HASH_VERSION}"
        return None

    def shard_count(self) -> int:
        """Shards of a chunk: one a worker, but one in all for MLA, whose latent every worker shares."""
        return self.world_size if self.planes == 2 else 1

    def shard_nbytes(self, token_count: int) -> int:
        """Payload of one shard of a chunk of `token_count` tokens, in bytes."""
        heads = self.kv_heads // self.shard_count()
        return self.layers * self.planes * token_count * heads * self.head_dim * DTYPE_NBYTES[self.dtype]

    def difference(self, other: "Namespace") -> str:
        """Which fields differ, as text for an error: `chunk_size 256 / 128, dtype float32 / bfloat16`."""
        names = (name for name in self.__slots__ if getattr(self, name) != getattr(other, name))
        return ", ".join(f"{name} {getattr(self, name)} / {getattr(other, name)}" for name in names)


@dataclass(frozen=True, slots=True)
class Media:
    """A picture, sound or other input inside a prompt: where it stands, and the digest of its content."""

    offset: Annotated[int, Ge(0), Le(MAX_TOKENS)]
    length: Annotated[int, Ge(0), Le(MAX_TOKENS)]
    digest: Annotated[bytes, Len(1, 64)]


@dataclass(frozen=True, slots=True)
class Identity:
    """What one request adds to the namespace. Two requests with different identities never share a chunk.

    Attributes:
        cache_salt: Separates tenants; empty for none.
        lora: Digest or exact name of the LoRA adapter's content; empty for none.
        media: In order of their offsets.
    """

    cache_salt: Annotated[str, Len(0, 1024)] = ""
    lora: Annotated[str, Len(0, 512)] = ""
    media: Annotated[tuple[Media, ...], Len(0, 1024)] = ()


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"s" + struct.pack("<I", len(encoded)) + encoded


def _blob(value: bytes) -> bytes:
    return b"b" + struct.pack("<I", len(value)) + value


def _number(value: int) -> bytes:
    return b"i" + struct.pack("<q", value)


def namespace_digest(namespace: Namespace) -> bytes:
    """16 bytes that stand for `namespace`."""
    fields = (getattr(namespace, name) for name in Namespace.__slots__)
    encoded = b"".join(_text(field) if isinstance(field, str) else _number(field) for field in fields)
    return blake2b(encoded, digest_size=KEY_NBYTES, person=b"p2pkv-namespace").digest()


def root_key(namespace: Namespace, identity: Identity) -> ChunkKey:
    """The parent of every first chunk within `namespace` and `identity`."""
    encoded = [_blob(namespace_digest(namespace)), _text(identity.cache_salt), _text(identity.lora)]
    encoded.append(_number(len(identity.media)))
    for media in identity.media:
        encoded += [_number(media.offset), _number(media.length), _blob(media.digest)]
    return blake2b(b"".join(encoded), digest_size=KEY_NBYTES, person=b"p2pkv-root").digest()


def chunk_key(parent: ChunkKey, tokens: TokenBytes) -> ChunkKey:
    """The key of the chunk that holds `tokens` and follows `parent`."""
    return blake2b(parent + tokens, digest_size=KEY_NBYTES).digest()


def full_chunk_keys(root: ChunkKey, tokens: TokenBytes, chunk_size: int) -> list[ChunkKey]:
    """Keys of the full chunks of a prompt, prefix first; a partly filled last chunk has none here."""
    step = chunk_size * TOKEN_NBYTES
    keys, parent = [], root
    for start in range(0, len(tokens) - step + 1, step):
        parent = chunk_key(parent, tokens[start : start + step])
        keys.append(parent)
    return keys


def tail_keys(parent: ChunkKey, tokens: TokenBytes) -> Iterator[tuple[int, ChunkKey]]:
    """Keys of every partly filled chunk that `tokens` could begin with: `(token count, key)`, shortest first."""
    running = blake2b(parent, digest_size=KEY_NBYTES)
    for start in range(0, len(tokens), TOKEN_NBYTES):
        running.update(tokens[start : start + TOKEN_NBYTES])
        yield start // TOKEN_NBYTES + 1, running.copy().digest()


def fingerprint(key: ChunkKey) -> Fingerprint:
    """What gossip carries of `key`."""
    return int.from_bytes(key[:8], "big")


def pack_tokens(tokens: Iterable[int]) -> TokenBytes:
    """Token ids as the core has them.

    Raises:
        ValueError: One isn't an integer from 0 to `MAX_TOKEN_ID`; the text says which.
    """
    try:
        packed = array("i", tokens)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"tokens must be integers from 0 to {MAX_TOKEN_ID}: {error}") from error
    if min(packed, default=0) < 0:
        raise ValueError(f"tokens must be integers from 0 to {MAX_TOKEN_ID}: {min(packed)} isn't")
    if byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def token_count(tokens: TokenBytes) -> int:
    """How many token ids `tokens` packs."""
    return len(tokens) // TOKEN_NBYTES

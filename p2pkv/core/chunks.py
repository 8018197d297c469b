"""A chunk as a manifest describes it: everything about it but its bytes."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le, Len

from p2pkv.core.keys import (
    MAX_TOKENS,
    TOKEN_NBYTES,
    ChunkKey,
    Fingerprint,
    Namespace,
    chunk_key,
    fingerprint,
    token_count,
)

PAGE_NBYTES = 4096
MAX_SHARD_NBYTES = 2**40
FILE_HEADER_NBYTES = 8192
"""A shard's file has this at most before its payload, beside `FILE_TOKEN_NBYTES` for each of its chunk's tokens: the namespace,
whose texts take 7 bytes for each of at most 640 characters, and some 600 for keys, numbers and names."""
FILE_TOKEN_NBYTES = 8
"""Of a token id, in hex."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk: its place in a prompt and the size of its payload.

    Attributes:
        key: Chain over all tokens up to this chunk's end.
        parent: Key of the chunk before, or the root.
        namespace: Digest of the namespace (`namespace_digest`).
        start: Tokens before this chunk in its prompt.
        tokens: This chunk's own token ids, little-endian int32; fewer than `chunk_size` in a partly filled chunk.
        shard_nbytes: Payload of each shard, in order of workers.
    """

    key: ChunkKey
    parent: ChunkKey
    namespace: Annotated[bytes, Len(16, 16)]
    start: Annotated[int, Ge(0), Le(MAX_TOKENS)]
    tokens: Annotated[bytes, Len(TOKEN_NBYTES, 65536 * TOKEN_NBYTES)]
    shard_nbytes: Annotated[tuple[Annotated[int, Ge(1), Le(MAX_SHARD_NBYTES)], ...], Len(1, 1024)]

    @property
    def token_count(self) -> int:
        """Tokens in this chunk."""
        return token_count(self.tokens)

    @property
    def end(self) -> int:
        """Tokens up to this chunk's end."""
        return self.start + self.token_count

    @property
    def fingerprint(self) -> Fingerprint:
        """What gossip carries of the key."""
        return fingerprint(self.key)

    @property
    def charged_nbytes(self) -> int:
        """What it counts against a limit on memory: each shard rounded up to whole pages."""
        return sum(-(-nbytes // PAGE_NBYTES) * PAGE_NBYTES for nbytes in self.shard_nbytes)

    @property
    def charged_file_nbytes(self) -> int:
        """What it counts against a limit on disk: each shard with the longest header, rounded up to whole pages."""
        header_nbytes = FILE_HEADER_NBYTES + FILE_TOKEN_NBYTES * self.token_count
        return sum(-(-(nbytes + header_nbytes) // PAGE_NBYTES) * PAGE_NBYTES for nbytes in self.shard_nbytes)

    def problem(self, namespace: Namespace) -> str | None:
        """Why this can't be a chunk of `namespace`; None when it can. A manifest from outside is checked with it."""
        if len(self.tokens) % TOKEN_NBYTES or self.token_count > namespace.chunk_size:
            return f"{len(self.tokens)} bytes of tokens don't fit chunks of {namespace.chunk_size} tokens"
        if self.start % namespace.chunk_size:
            return f"it starts at token {self.start}, not at a multiple of {namespace.chunk_size}"
        if self.key != chunk_key(self.parent, self.tokens):
            return "its key doesn't follow from its parent and tokens"
        expected = (namespace.shard_nbytes(self.token_count),) * namespace.shard_count()
        if self.shard_nbytes != expected:
            return f"its shards have {self.shard_nbytes} bytes, its layout needs {expected}"
        return None

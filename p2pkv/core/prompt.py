"""A prompt as it is looked for: tokens within a namespace, for a request's identity."""

from dataclasses import dataclass

from p2pkv.core.keys import ChunkKey, Identity, Namespace, TokenBytes, namespace_digest, root_key


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to look for.

    Attributes:
        namespace: Digest of the namespace; chunks of others don't match.
        root: Of namespace and identity.
        tokens: The prompt's own, from its beginning.
        chunk_size: Tokens in a full chunk.
    """

    namespace: bytes
    root: ChunkKey
    tokens: TokenBytes
    chunk_size: int


def prompt_of(namespace: Namespace, identity: Identity, tokens: TokenBytes) -> Prompt:
    """`tokens` within a namespace, for a request's identity."""
    return Prompt(namespace_digest(namespace), root_key(namespace, identity), tokens, namespace.chunk_size)

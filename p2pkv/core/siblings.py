"""Chunks that follow one and the same prefix, sorted by their tokens, so that matching costs a bisection, not a scan.

A system prompt may have thousands of continuations; a lookup that ends among them must not look at each.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from p2pkv.core.keys import TOKEN_NBYTES, TokenBytes


class HasTokens(Protocol):
    """Anything with token ids of its own."""

    @property
    def tokens(self) -> TokenBytes:
        """Little-endian int32."""
        ...


T = TypeVar("T", bound=HasTokens)


def shared_nbytes(one: TokenBytes, other: TokenBytes) -> int:
    """Length in bytes of the longest run of whole tokens that both begin with."""
    low, high = 0, min(len(one), len(other)) // TOKEN_NBYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * TOKEN_NBYTES] == other[: middle * TOKEN_NBYTES]:
            low = middle
        else:
            high = middle - 1
    return low * TOKEN_NBYTES


def _tokens_of(item: HasTokens) -> TokenBytes:
    return item.tokens


class Siblings(Generic[T]):
    """The children of one parent, in byte order of their tokens. No two have the same."""

    def __init__(self) -> None:
        self._sorted: list[T] = []

    def __iter__(self) -> Iterator[T]:
        return iter(self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, item: T) -> None:
        """Put `item` in its place."""
        self._sorted.insert(bisect_left(self._sorted, item.tokens, key=_tokens_of), item)

    def remove(self, item: T) -> None:
        """Take `item` out, which is in."""
        del self._sorted[bisect_left(self._sorted, item.tokens, key=_tokens_of)]

    def by_closeness(self, tokens: TokenBytes) -> Iterator[tuple[T, int]]:
        """Items that begin like `tokens`, most shared tokens first: `(item, shared token count)`.

        In byte order what shares most stands next to where `tokens` would stand, and it only falls off from there.
        """
        right = bisect_left(self._sorted, tokens, key=_tokens_of)
        left = right - 1
        while True:
            before = shared_nbytes(self._sorted[left].tokens, tokens) if left >= 0 else 0
            after = shared_nbytes(self._sorted[right].tokens, tokens) if right < len(self._sorted) else 0
            if not max(before, after):
                return
            if after >= before:
                yield self._sorted[right], after // TOKEN_NBYTES
                right += 1
            else:
                yield self._sorted[left], before // TOKEN_NBYTES
                left -= 1

    def prefixes_of(self, tokens: TokenBytes) -> Iterator[T]:
        """Items whose tokens all stand at the beginning of `tokens`, longest first.

        The greatest item not above `tokens` either is a prefix of it, or shares with it all that any prefix could.
        """
        while tokens:
            index = bisect_right(self._sorted, tokens, key=_tokens_of) - 1
            if index < 0:
                return
            item = self._sorted[index]
            shared = shared_nbytes(item.tokens, tokens)
            if shared == len(item.tokens):
                yield item
                tokens = tokens[: shared - TOKEN_NBYTES]
            else:
                tokens = tokens[:shared]

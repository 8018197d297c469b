"""The KV cache as tensors, and how a shard's bytes become one.

A shard's payload is one worker's part of a chunk: `[layers, planes, tokens, kv_heads, head_dim]`, C order, nothing else.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from p2pkv.errors import ErrorCode, Failure, InvalidRequestError


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and type of a model's KV cache.

    Attributes:
        layers: Layers of the model.
        kv_heads: KV heads of the model, over all workers; 1 for MLA.
        head_dim: Elements of a head; of the joint latent for MLA.
        dtype: By torch's name: `"float32"`, `"bfloat16"`, ...
        planes: 2 for keys and values, 1 for MLA.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    planes: int = 2

    def of_worker(self, world_size: int) -> "KVLayout":
        """The part that each of `world_size` workers has: its share of the heads; for MLA all of it."""
        return replace(self, kv_heads=self.kv_heads // world_size) if self.planes == 2 else self

    def shape(self, token_count: int) -> tuple[int, int, int, int, int]:
        """Shape of the tensor of `token_count` tokens."""
        return (self.layers, self.planes, token_count, self.kv_heads, self.head_dim)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def check(self, kv: torch.Tensor, token_count: int) -> None:
        """Check that `kv` is what this layout says of `token_count` tokens.

        Raises:
            InvalidRequestError: It isn't; the text says what it is and what it should be.
        """
        if tuple(kv.shape) != self.shape(token_count) or kv.dtype != self.torch_dtype:
            detail = (
                f"kv is {kv.dtype} {tuple(kv.shape)}; {token_count} tokens of this layout are {self.torch_dtype} "
                f"{self.shape(token_count)}, as [layers, planes, tokens, kv_heads, head_dim]"
            )
            raise InvalidRequestError(Failure(ErrorCode.INVALID_REQUEST, detail))


def write_shard(descriptor: int, kv: torch.Tensor) -> None:
    """Fill lent memory with `kv` and unmap it.

    Args:
        descriptor: Of memory with room for `kv`; stays the caller's.
        kv: `[layers, planes, tokens, kv_heads, head_dim]`, any strides, any device; only read.
    """
    with mmap.mmap(descriptor, kv.numel() * kv.element_size()) as memory:
        memory.madvise(mmap.MADV_DONTFORK)  # a child's copy of this map would make the node refuse the commit
        _tensor(memory, tuple(kv.shape), kv.dtype).copy_(kv)


@contextmanager
def open_shard(descriptor: int, layout: KVLayout, token_count: int) -> Iterator[torch.Tensor]:
    """A shard as a tensor, only to be read, and only within the context.

    Args:
        descriptor: Of sealed memory; stays the caller's.
        layout: Of the worker's part.
        token_count: Tokens in the shard.
    """
    shape, dtype = layout.shape(token_count), layout.torch_dtype
    # A private map, because torch warns of read-only buffers; a write to it would reach nobody's memory but our own.
    with mmap.mmap(descriptor, dtype.itemsize * torch.Size(shape).numel(), access=mmap.ACCESS_COPY) as memory:
        yield _tensor(memory, shape, dtype)


def _tensor(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`memory` as a tensor, which must be gone before `memory` is closed: torch doesn't hold it open."""
    return torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel()).view(shape)

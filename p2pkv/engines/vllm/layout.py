"""vLLM's paged KV caches by the tokens of a request, as the canonical tensor `[layers, planes, tokens, kv_heads, head_dim]`.

vLLM registers a tensor a layer, logically `[blocks, heads, tokens of a block, content]` in any order of memory; what lies in
the content is the attention backend's affair. Each function here that reads a content gives it as views by token, and names the
file of vLLM that it was written from. Nothing here imports vLLM: detection.py reads its objects, proof.py tries a layout out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch

from p2pkv.core.keys import DTYPE_NBYTES
from p2pkv.engines.layout import KVLayout
from p2pkv.errors import UnsupportedCacheError


class Refusal(StrEnum):
    """Why vLLM's caches can't be used."""

    BACKEND = "backend"
    CPU_ISA = "cpu_isa"
    SHAPE = "shape"
    DTYPE = "dtype"
    QUANTISED = "quantised"
    SEVERAL_GROUPS = "several_groups"
    LAYERS_DIFFER = "layers_differ"
    OTHER_LAYERS = "other_layers"
    SLIDING_WINDOW = "sliding_window"
    PACKED = "packed"
    CONTEXT_PARALLEL = "context_parallel"
    PIPELINE_PARALLEL = "pipeline_parallel"
    NO_SPARE_BLOCK = "no_spare_block"
    UNEXPECTED = "unexpected"
    MISMATCH = "mismatch"


class UnsupportedLayoutError(UnsupportedCacheError):
    """vLLM's caches are laid out in a way that isn't known here, or not surely enough: it must run without p2pkv."""


Planes = tuple[torch.Tensor, ...]
"""One layer's keys and values, or only its latents: views `[blocks, tokens of a block, kv_heads, head_dim]`, writable."""


def keys_transposed(cache: torch.Tensor) -> Planes:
    """CPU_ATTN on x86 without AMX: in a (block, head) lie the keys as `[head_dim, tokens]`, then the values by token.

    Source: vllm/v1/attention/backends/cpu_attn.py, `do_kv_cache_update`, and the operation that it calls with isa `vec` or
    `vec16`, csrc/cpu/cpu_attn_vec.hpp.
    """
    blocks, heads, tokens, content = cache.shape
    head_dim = content // 2
    halves = cache.view(blocks, heads, 2, tokens * head_dim)
    keys = halves[:, :, 0].view(blocks, heads, head_dim, tokens)
    values = halves[:, :, 1].view(blocks, heads, tokens, head_dim)
    return keys.permute(0, 3, 1, 2), values.permute(0, 2, 1, 3)


def keys_then_values(cache: torch.Tensor) -> Planes:
    """FLASH_ATTN, FLASHINFER, TRITON_ATTN, FLEX_ATTENTION: each token of a head has its key, then its value.

    Whether tokens or heads lie next to each other in memory (NHD, HND), and layers or blocks outermost, is in the strides.

    Source: vllm/v1/attention/backends/flash_attn.py, flashinfer.py, triton_attn.py, flex_attention.py, `do_kv_cache_update`;
    vllm/v1/kv_cache_layout.py and kv_cache_interface.py, `create_kv_cache_views`.
    """
    keys, values = cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values


def latents(cache: torch.Tensor) -> Planes:
    """MLA: each token has one latent with the rotary part behind it, shared by all heads.

    Source: vllm/v1/attention/backend.py, `MLAAttentionImpl.do_kv_cache_update`, and mla/cpu_mla.py;
    vllm/model_executor/layers/attention/mla_attention.py, `get_kv_cache_spec`.
    """
    return (cache.transpose(1, 2),)


PLANES_OF_BACKEND: Mapping[str, Callable[[torch.Tensor], Planes]] = {
    "CPU_ATTN": keys_transposed,
    "FLASH_ATTN": keys_then_values,
    "FLASHINFER": keys_then_values,
    "TRITON_ATTN": keys_then_values,
    "FLEX_ATTENTION": keys_then_values,
    "FLASHMLA": latents,
    "FLASH_ATTN_MLA": latents,
    "FLASHINFER_MLA": latents,
    "CUTLASS_MLA": latents,
    "TRITON_MLA": latents,
    "CPU_MLA": latents,
}
"""By `AttentionBackend.get_name()`; others keep scales or packed heads among the content, or weren't read."""
CPU_ISAS = ("vec", "vec16")
"""Those of CPU_ATTN whose cache `keys_transposed` describes; `amx`, `neon` and others pack it otherwise."""


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What vLLM says of the caches of one worker.

    Attributes:
        backend: Name of the attention backend, the same for all layers.
        isa: For CPU_ATTN, the instruction set that it packs for; None for others.
        block_size: Tokens in one of the scheduler's blocks.
        block_count: Of the scheduler's blocks.
        kv_heads: Of this worker; 1 for MLA.
        head_dim: Elements of a head, of keys and of values alike; of the latent with its rotary part for MLA.
        dtype: Of the model's keys and values, and of the caches.
    """

    backend: str
    isa: str | None
    block_size: int
    block_count: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class PagedLayout:
    """vLLM's caches of one worker, by the tokens of a request instead of by blocks. Any thread may use it.

    Which tokens lie where is the scheduler's to say; nothing here keeps two threads from one block.

    Attributes:
        caches: The registered tensors, a layer each in the model's order.
        layers: The same, as views by token.
        layout: Of what `gather` gives and `scatter` takes: this worker's heads.
        block_size: Tokens in one of the scheduler's blocks.
        block_count: Of the scheduler's blocks.
        token_nbytes: Bytes of a token's KV, all layers.
    """

    def __init__(self, caches: Sequence[torch.Tensor], layers: Sequence[Planes], block_size: int) -> None:
        self.caches = tuple(caches)
        self.layers = tuple(layers)
        self.block_size = block_size
        first = self.layers[0][0]
        self.layout = KVLayout(
            layers=len(self.layers),
            planes=len(self.layers[0]),
            kv_heads=first.shape[2],
            head_dim=first.shape[3],
            dtype=str(first.dtype).removeprefix("torch."),
        )
        self.block_count = first.shape[0] * first.shape[1] // block_size
        self.token_nbytes = torch.Size(self.layout.shape(1)).numel() * first.element_size()
        self._device = first.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._kernel_block_size = first.shape[1]  # vLLM may have split the scheduler's blocks for the backend's kernels

    def gather(self, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Copy tokens out of the request whose blocks are `block_ids`.

        Args:
            block_ids: The scheduler's, from the request's first token on.
            start: First token.
            end: One past the last, more than `start`.

        Returns:
            On the CPU, the caller's: `[layers, planes, end - start, kv_heads, head_dim]`, part of whole blocks in C order.
            Complete: nothing is still being copied.
        """
        with torch.cuda.stream(self._stream):  # which does nothing with None
            blocks = self.touched(block_ids, start, end)
            planes = [plane for layer in self.layers for plane in layer]
            kv = torch.empty((len(planes), len(blocks), *planes[0].shape[1:]), dtype=planes[0].dtype, device=self._device)
            for target, plane in zip(kv.unbind(), planes, strict=True):
                # By whole blocks: on a CPU 4 times as fast as token by token. And in one call: at the end of each this thread
                # asks for the interpreter's lock, which on a CPU the model's thread needs all the time.
                torch.index_select(plane, 0, blocks, out=target)
            if self._stream is not None:
                kv = torch.empty(kv.shape, dtype=kv.dtype, pin_memory=True).copy_(kv, non_blocking=True)
                self._stream.synchronize()
            first = start % self._kernel_block_size
            return kv.flatten(1, 2)[:, first : first + end - start].view(self.layout.shape(end - start))

    def scatter(self, block_ids: Sequence[int], start: int, kv: torch.Tensor) -> None:
        """Write tokens of the request whose blocks are `block_ids`; they are there when it returns.

        Args:
            block_ids: The scheduler's, from the request's first token on.
            start: Token that the first of `kv` is.
            kv: `[layers, planes, tokens, kv_heads, head_dim]` in the layout's dtype, any strides, any device; only read.
        """
        self.layout.check(kv, kv.shape[2])
        with torch.cuda.stream(self._stream):
            slots = self.slots(block_ids, start, start + kv.shape[2])
            where = slots // self._kernel_block_size, slots % self._kernel_block_size
            for layer, planes in zip(kv.to(self._device, non_blocking=True), self.layers, strict=True):
                for source, plane in zip(layer, planes, strict=True):
                    plane[where] = source
            if self._stream is not None:
                self._stream.synchronize()

    def fence(self) -> Callable[[], None]:
        """Called where a step has been given to the device: gives what makes `gather` wait until it has been computed there."""
        if self._stream is None:
            return lambda: None
        computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        computed.record(torch.cuda.current_stream(self._device))
        return partial(self._stream.wait_event, computed)

    def slots(self, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """The slots of tokens `start` to `end`, as vLLM's slot mapping has them: int64, on the caches' device."""
        blocks, size = self.touched(block_ids, start, end), self._kernel_block_size
        tokens = torch.arange(start, end, device=self._device)
        return blocks[tokens // size - start // size] * size + tokens % size

    def touched(self, block_ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """The blocks of `caches` that tokens `start` to `end` lie in, in order: int64, on the caches' device."""
        size, ratio = self._kernel_block_size, self.block_size // self._kernel_block_size
        ordinals = range(start // size, (end - 1) // size + 1)
        return torch.tensor([block_ids[each // ratio] * ratio + each % ratio for each in ordinals], device=self._device)


def paged_layout(facts: CacheFacts, caches: Sequence[torch.Tensor]) -> PagedLayout:
    """The layout of `caches`, as far as facts and shapes tell it; `proof.prove` then tries it.

    Args:
        facts: What vLLM says of them.
        caches: A layer each, in the model's order.

    Raises:
        UnsupportedLayoutError: Such caches aren't known here.
    """
    read = PLANES_OF_BACKEND.get(facts.backend)
    if read is None:
        raise UnsupportedLayoutError(Refusal.BACKEND, f"what {facts.backend} keeps in its cache isn't known")
    if facts.backend == "CPU_ATTN" and facts.isa not in CPU_ISAS:
        known = " and ".join(CPU_ISAS)
        raise UnsupportedLayoutError(Refusal.CPU_ISA, f"{facts.isa} packs the cache in its own way, {known} are known")
    if str(facts.dtype).removeprefix("torch.") not in DTYPE_NBYTES:
        raise UnsupportedLayoutError(Refusal.DTYPE, f"{facts.dtype} isn't known")
    if not caches:
        raise UnsupportedLayoutError(Refusal.SHAPE, "no layer has a cache")
    for cache in caches:
        _check_cache(facts, cache, 1 if read is latents else 2)
    if len({cache.data_ptr() for cache in caches}) < len(caches):
        raise UnsupportedLayoutError(Refusal.OTHER_LAYERS, "several layers share a cache")
    if read is keys_transposed and not all(_is_dense_inside(cache) for cache in caches):
        raise UnsupportedLayoutError(Refusal.SHAPE, f"a block of strides {caches[0].stride()} isn't in one piece")
    return PagedLayout(caches, [read(cache) for cache in caches], facts.block_size)


def _check_cache(facts: CacheFacts, cache: torch.Tensor, planes: int) -> None:
    """Refuse one layer's tensor that isn't `[blocks, heads, tokens of a block, content]` as `facts` say."""
    if cache.dtype != facts.dtype:
        raise UnsupportedLayoutError(Refusal.QUANTISED, f"a cache of {cache.dtype} for keys and values of {facts.dtype}")
    wanted = (facts.kv_heads, planes * facts.head_dim)
    if cache.dim() != 4 or (cache.shape[1], cache.shape[3]) != wanted:
        raise UnsupportedLayoutError(
            Refusal.SHAPE, f"{tuple(cache.shape)} isn't [blocks, {wanted[0]} heads, tokens, {wanted[1]} elements]"
        )
    blocks, _, tokens, _ = cache.shape
    if not tokens or facts.block_size % tokens or blocks * tokens != facts.block_count * facts.block_size:
        raise UnsupportedLayoutError(
            Refusal.SHAPE, f"{blocks} times {tokens} tokens aren't {facts.block_count} blocks of {facts.block_size}"
        )


def _is_dense_inside(cache: torch.Tensor) -> bool:
    _, _, tokens, content = cache.shape
    return cache.stride()[1:] == (tokens * content, content, 1)

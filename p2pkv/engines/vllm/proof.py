"""Tries a layout out before the first request: the engine writes with its own operation, and we read.

Facts and shapes can't tell all: another processor packs otherwise, another version of vLLM moves a half. What this finds wrong
turns p2pkv off; nothing is guessed.
"""

from collections.abc import Callable

import torch

from p2pkv.engines.vllm.layout import PagedLayout, Refusal, UnsupportedLayoutError

Write = Callable[[int, torch.Tensor, torch.Tensor], None]
"""The engine's own operation: writes, in one layer, `[planes, tokens, kv_heads, head_dim]` to slots (int64, on the device)."""


def prove(paged: PagedLayout, write: Write) -> None:
    """Check, layer by layer, that `gather` reads what the engine wrote, and that `scatter` writes where the engine does.

    It uses the last two blocks, the scheduler's block 0 never: vLLM keeps that for padding. Call it before anything is
    scheduled; afterwards every byte is as it was.

    Raises:
        UnsupportedLayoutError: `paged` isn't how the engine lays its caches out, or there is no block to try it in.
    """
    block_ids = list(range(max(1, paged.block_count - 2), paged.block_count))[::-1]
    if not block_ids:
        raise UnsupportedLayoutError(Refusal.NO_SPARE_BLOCK, "there is no block besides the one for padding")
    token_count = len(block_ids) * paged.block_size
    blocks = paged.touched(block_ids, 0, token_count)
    saved = [cache[blocks] for cache in paged.caches]
    try:
        paged.fence()()
        before = paged.gather(block_ids, 0, token_count)
        start, end = token_count // 8, token_count - token_count // 16  # inside the first block, and the last
        expected = before.clone()
        expected[:, :, start:end] = _random_kv(paged, end - start)
        slots = paged.slots(block_ids, start, end)
        for layer, kv in enumerate(expected[:, :, start:end].to(slots.device)):
            write(layer, kv, slots)
        paged.fence()()
        _compare(paged.gather(block_ids, 0, token_count), expected, "what the engine writes isn't what is read")
        paged.scatter(block_ids, start, before[:, :, start:end])
        for cache, original in zip(paged.caches, saved, strict=True):
            _compare(cache[blocks], original, "the engine writes where nothing is read")
    finally:
        for cache, original in zip(paged.caches, saved, strict=True):
            cache[blocks] = original
        paged.fence()()


def _random_kv(paged: PagedLayout, token_count: int) -> torch.Tensor:
    """Random numbers: no two places hold the same by chance."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(paged.layout.shape(token_count), generator=rng).to(paged.layout.torch_dtype)


def _compare(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Refuse the layout unless all bits are equal; NaN equals itself here."""
    bits = [tensor.contiguous().view(torch.uint8) for tensor in (found, expected)]
    if not torch.equal(*bits):
        first = torch.nonzero(bits[0] != bits[1])[0].tolist()
        raise UnsupportedLayoutError(Refusal.MISMATCH, f"{what}; the first wrong byte is at {first} of {tuple(bits[0].shape)}")

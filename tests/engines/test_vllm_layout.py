import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.engines.vllm.layout import CacheFacts, PagedLayout, Refusal, UnsupportedLayoutError, paged_layout
from p2pkv.engines.vllm.proof import prove

LAYERS, BLOCKS, HEADS, HEAD_DIM, BLOCK_SIZE = 3, 6, 2, 4, 32
GPU = "cuda" if torch.cuda.is_available() else "cpu"
"""Where there is one, what vLLM keeps on a GPU is kept there."""
FACTS = CacheFacts("FLASH_ATTN", None, BLOCK_SIZE, BLOCKS, HEADS, HEAD_DIM, torch.float32)

Put = Callable[[torch.Tensor, torch.Tensor, int], None]
"""Writes one token's `[planes, heads, head_dim]` to a slot of a layer's cache, number by number, as the kernel does."""


def put_cpu(cache: torch.Tensor, kv: torch.Tensor, slot: int) -> None:
    _, heads, tokens, content = cache.shape
    block, offset = divmod(slot, tokens)
    for head, element in itertools.product(range(heads), range(content // 2)):
        numbers = cache[block, head].view(-1)
        numbers[element * tokens + offset] = kv[0, head, element]
        numbers[tokens * content // 2 + offset * content // 2 + element] = kv[1, head, element]


def put_gpu(cache: torch.Tensor, kv: torch.Tensor, slot: int) -> None:
    block, offset = divmod(slot, cache.shape[2])
    for head in range(cache.shape[1]):
        cache[block, head, offset] = torch.cat(list(kv[:, head]))


@dataclass(frozen=True)
class Kind:
    """A way in which vLLM lays its caches out.

    Attributes:
        order: Of the axes `LBHNC` in memory, as vLLM names its layouts.
        put: Writes as the backend does.
        kernel_block_size: Tokens in a block of the tensors.
        dtype: Of the caches.
    """

    backend: str
    order: str
    put: Put
    kernel_block_size: int = BLOCK_SIZE
    dtype: torch.dtype = torch.float32

    @property
    def facts(self) -> CacheFacts:
        mla = self.backend.endswith("MLA")
        isa = "vec" if self.backend == "CPU_ATTN" else None
        return replace(FACTS, backend=self.backend, isa=isa, kv_heads=1 if mla else HEADS, dtype=self.dtype)

    def caches(self) -> list[torch.Tensor]:
        """Zeros, laid out as vllm/v1/kv_cache_interface.py does in `create_kv_cache_views`."""
        planes = 1 if self.backend.endswith("MLA") else 2
        blocks = BLOCKS * BLOCK_SIZE // self.kernel_block_size
        sizes = {"L": LAYERS, "B": blocks, "H": self.facts.kv_heads, "N": self.kernel_block_size, "C": planes * HEAD_DIM}
        device = "cpu" if self.backend == "CPU_ATTN" else GPU
        memory = torch.zeros([sizes[axis] for axis in self.order], dtype=self.dtype, device=device)
        return list(memory.permute([self.order.index(axis) for axis in "LBHNC"]))

    def paged(self) -> PagedLayout:
        return paged_layout(self.facts, self.caches())


KINDS = {
    "cpu": Kind("CPU_ATTN", "LBHNC", put_cpu),
    "cpu, bfloat16": Kind("CPU_ATTN", "LBHNC", put_cpu, dtype=torch.bfloat16),
    "nhd": Kind("FLASH_ATTN", "LBNHC", put_gpu),
    "hnd": Kind("FLASHINFER", "LBHNC", put_gpu, dtype=torch.float16),
    "blocks outermost": Kind("TRITON_ATTN", "BLHNC", put_gpu),
    "heads outermost": Kind("FLASH_ATTN", "LHBNC", put_gpu),
    "layers inside heads": Kind("FLASH_ATTN", "BHLNC", put_gpu),
    "split blocks": Kind("FLASH_ATTN", "LBNHC", put_gpu, kernel_block_size=8),
    "mla": Kind("FLASHMLA", "LBHNC", put_gpu),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def random_kv(paged: PagedLayout, token_count: int) -> torch.Tensor:
    return torch.randn(paged.layout.shape(token_count)).to(paged.layout.torch_dtype)


@every_kind
def test_what_the_engine_writes_is_what_is_gathered(kind: Kind) -> None:
    paged, blocks = kind.paged(), [5, 0, 3]
    kv = random_kv(paged, 3 * BLOCK_SIZE)
    for token, layer in itertools.product(range(3 * BLOCK_SIZE), range(LAYERS)):
        kind.put(paged.caches[layer], kv[layer, :, token], blocks[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE)
    for start, end in [(0, 96), (0, 1), (95, 96), (31, 33), (5, 30), (40, 96), (0, 64)]:
        assert torch.equal(paged.gather(blocks, start, end), kv[:, :, start:end])


@every_kind
def test_what_is_scattered_lies_where_the_engine_would_have_written_it(kind: Kind) -> None:
    scattered, expected = kind.paged(), kind.paged()
    kv = random_kv(scattered, 40)
    scattered.scatter([4, 2], 9, kv)
    for token, layer in itertools.product(range(40), range(LAYERS)):
        block, offset = divmod(9 + token, BLOCK_SIZE)
        kind.put(expected.caches[layer], kv[layer, :, token], [4, 2][block] * BLOCK_SIZE + offset)
    for ours, engines in zip(scattered.caches, expected.caches, strict=True):
        assert torch.equal(ours, engines)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], int, int]:
    blocks = draw(st.permutations(range(BLOCKS)))[: draw(st.integers(1, BLOCKS))]
    start = draw(st.integers(0, len(blocks) * BLOCK_SIZE - 1))
    return blocks, start, draw(st.integers(start + 1, len(blocks) * BLOCK_SIZE))


@every_kind
@given(request=requests())
def test_what_was_scattered_is_gathered_and_nothing_else_has_changed(kind: Kind, request: tuple[list[int], int, int]) -> None:
    blocks, start, end = request
    paged = kind.paged()
    everything = list(range(BLOCKS))
    paged.scatter(everything, 0, random_kv(paged, BLOCKS * BLOCK_SIZE))
    before = paged.gather(everything, 0, BLOCKS * BLOCK_SIZE)
    kv = random_kv(paged, end - start)
    paged.scatter(blocks, start, kv)
    assert torch.equal(paged.gather(blocks, start, end), kv)
    untouched = torch.ones(BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    untouched[paged.slots(blocks, start, end).cpu()] = False
    assert torch.equal(paged.gather(everything, 0, BLOCKS * BLOCK_SIZE)[:, :, untouched], before[:, :, untouched])


def test_a_layout_says_what_its_tokens_are() -> None:
    paged = KINDS["split blocks"].paged()
    assert (paged.block_size, paged.block_count, paged.token_nbytes) == (32, 6, LAYERS * 2 * HEADS * HEAD_DIM * 4)
    assert paged.layout.shape(7) == (LAYERS, 2, 7, HEADS, HEAD_DIM)
    assert paged.slots([5, 2], 30, 34).tolist() == [190, 191, 64, 65]


# --- what isn't known is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "shape", "reason"),
    [
        (replace(FACTS, backend="ROCM_ATTN"), None, Refusal.BACKEND),
        (replace(FACTS, backend="CPU_ATTN", isa="amx"), None, Refusal.CPU_ISA),
        (replace(FACTS, backend="CPU_ATTN"), None, Refusal.CPU_ISA),
        (replace(FACTS, dtype=torch.bfloat16), None, Refusal.QUANTISED),
        (replace(FACTS, dtype=torch.complex64), None, Refusal.DTYPE),
        (replace(FACTS, backend="FLASHMLA"), None, Refusal.SHAPE),
        (FACTS, (BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM), Refusal.SHAPE),
        (FACTS, (BLOCKS, HEADS, BLOCK_SIZE, 2, HEAD_DIM), Refusal.SHAPE),
        (FACTS, (BLOCKS - 1, HEADS, BLOCK_SIZE, 2 * HEAD_DIM), Refusal.SHAPE),
        (FACTS, (BLOCKS, HEADS, 2 * BLOCK_SIZE, 2 * HEAD_DIM), Refusal.SHAPE),
    ],
)
def test_what_is_not_known_is_refused(facts: CacheFacts, shape: tuple[int, ...] | None, reason: Refusal) -> None:
    caches = [torch.zeros(shape or (BLOCKS, HEADS, BLOCK_SIZE, 2 * HEAD_DIM)) for _ in range(LAYERS)]
    with pytest.raises(UnsupportedLayoutError) as refused:
        paged_layout(facts, caches)
    assert refused.value.reason == reason


def test_layers_that_share_a_cache_are_refused() -> None:
    first, second, _ = KINDS["nhd"].caches()
    with pytest.raises(UnsupportedLayoutError) as refused:
        paged_layout(FACTS, [first, second, first])
    assert refused.value.reason == Refusal.OTHER_LAYERS


def test_a_cpu_cache_whose_blocks_are_not_in_one_piece_is_refused() -> None:
    with pytest.raises(UnsupportedLayoutError) as refused:
        replace(KINDS["cpu"], order="LBNHC").paged()
    assert refused.value.reason == Refusal.SHAPE


# --- the proof ------------------------------------------------------------------------------------------------------------


def written_by(paged: PagedLayout, put: Put) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
    def write(layer: int, kv: torch.Tensor, slots: torch.Tensor) -> None:
        for token, slot in enumerate(slots.tolist()):
            put(paged.caches[layer], kv[:, token], slot)

    return write


@every_kind
def test_a_right_layout_is_proved_and_leaves_every_byte_as_it_was(kind: Kind) -> None:
    paged = kind.paged()
    for cache in paged.caches:
        cache.copy_(torch.randn(cache.shape))
        cache[-1, 0, 0, 0] = torch.nan
    before = [cache.clone() for cache in paged.caches]
    prove(paged, written_by(paged, kind.put))
    for cache, original in zip(paged.caches, before, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), original.nan_to_num(7.0))


def put_values_first(cache: torch.Tensor, kv: torch.Tensor, slot: int) -> None:
    put_gpu(cache, kv.flip(0), slot)


def put_in_the_next_slot(cache: torch.Tensor, kv: torch.Tensor, slot: int) -> None:
    put_gpu(cache, kv, slot ^ 1)


def put_rounded(cache: torch.Tensor, kv: torch.Tensor, slot: int) -> None:
    put_gpu(cache, kv.to(torch.float16).to(kv.dtype), slot)


def put_nothing(cache: torch.Tensor, kv: torch.Tensor, slot: int) -> None:
    """As an operation that leaves its work to another call."""


def put_twice(cache: torch.Tensor, kv: torch.Tensor, slot: int) -> None:
    put_gpu(cache, kv, slot)
    put_gpu(cache, kv, slot - slot % BLOCK_SIZE)


@pytest.mark.parametrize("put", [put_values_first, put_in_the_next_slot, put_rounded, put_nothing, put_twice, put_cpu])
def test_a_wrong_layout_is_found_out_and_every_byte_is_restored(put: Put) -> None:
    paged = KINDS["hnd"].paged() if put is put_cpu else KINDS["blocks outermost"].paged()
    with pytest.raises(UnsupportedLayoutError) as refused:
        prove(paged, written_by(paged, put))
    assert refused.value.reason == Refusal.MISMATCH
    assert not any(cache.any() for cache in paged.caches)


def test_one_wrong_layer_is_enough() -> None:
    paged = KINDS["nhd"].paged()
    right, wrong = written_by(paged, put_gpu), written_by(paged, put_values_first)
    with pytest.raises(UnsupportedLayoutError):
        prove(paged, lambda layer, kv, slots: (wrong if layer == LAYERS - 1 else right)(layer, kv, slots))


def test_the_block_that_vllm_keeps_for_padding_is_never_written() -> None:
    caches = [torch.zeros(2, HEADS, BLOCK_SIZE, 2 * HEAD_DIM) for _ in range(LAYERS)]
    paged = paged_layout(replace(FACTS, block_count=2), caches)
    written: set[int] = set()

    def write(layer: int, kv: torch.Tensor, slots: torch.Tensor) -> None:
        written.update(slots.tolist())
        written_by(paged, put_gpu)(layer, kv, slots)

    prove(paged, write)
    assert written
    assert min(written) >= BLOCK_SIZE


def test_without_a_spare_block_nothing_is_tried() -> None:
    paged = paged_layout(replace(FACTS, block_count=1), [torch.zeros(1, HEADS, BLOCK_SIZE, 2 * HEAD_DIM)])
    with pytest.raises(UnsupportedLayoutError) as refused:
        prove(paged, lambda layer, kv, slots: pytest.fail("written"))
    assert refused.value.reason == Refusal.NO_SPARE_BLOCK

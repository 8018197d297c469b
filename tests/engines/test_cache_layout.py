import fcntl
import os

import pytest
import torch

from p2pkv.core.keys import DTYPE_NBYTES, Namespace
from p2pkv.engines import KVLayout
from p2pkv.engines.layout import open_shard, write_shard
from p2pkv.errors import InvalidRequestError
from p2pkv.store import memory


def layout(dtype: str = "float32", planes: int = 2) -> KVLayout:
    return KVLayout(layers=3, kv_heads=4, head_dim=8, dtype=dtype, planes=planes)


def random_kv(part: KVLayout, token_count: int) -> torch.Tensor:
    return (torch.rand(part.shape(token_count)) * 100).to(part.torch_dtype)


def raw(kv: torch.Tensor) -> bytes:
    return bytes(kv.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("dtype", DTYPE_NBYTES)
def test_a_shard_gives_back_every_bit_of_every_dtype(dtype: str) -> None:
    part = layout(dtype)
    kv = random_kv(part, 5)
    descriptor = memory.create(kv.nbytes)
    write_shard(descriptor, kv)
    memory.seal(descriptor)
    with open_shard(descriptor, part, 5) as got:
        assert raw(got) == raw(kv)
    assert os.pread(descriptor, kv.nbytes, 0) == raw(kv)
    os.close(descriptor)


def test_strided_kv_is_stored_in_order() -> None:
    part = layout()
    by_head = random_kv(KVLayout(layers=3, kv_heads=7, head_dim=8, dtype="float32"), 4).transpose(2, 3)
    descriptor = memory.create(by_head.nbytes)
    write_shard(descriptor, by_head)
    assert os.pread(descriptor, by_head.nbytes, 0) == raw(by_head)
    with open_shard(descriptor, part, 7) as got:
        assert torch.equal(got, by_head)
    os.close(descriptor)


def test_a_written_shard_is_unmapped_and_can_be_sealed_at_once() -> None:
    kv = random_kv(layout(), 5)
    descriptor = memory.create(kv.nbytes)
    write_shard(descriptor, kv)
    memory.seal(descriptor)
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & memory.READ_ONLY_SEALS == memory.READ_ONLY_SEALS
    os.close(descriptor)


@pytest.mark.parametrize(("planes", "heads"), [(2, 2), (1, 4)])
def test_a_worker_has_its_share_of_the_heads_and_all_of_a_latent(planes: int, heads: int) -> None:
    assert layout(planes=planes).of_worker(2).kv_heads == heads


@pytest.mark.parametrize("planes", [1, 2])
def test_a_shard_has_as_many_bytes_as_the_core_reckons(planes: int) -> None:
    whole = KVLayout(layers=3, kv_heads=4, head_dim=8, dtype="bfloat16", planes=planes)
    namespace = Namespace(
        model="m", weights="", dtype="bfloat16", layers=3, planes=planes, kv_heads=4, head_dim=8, chunk_size=16, world_size=2
    )
    assert random_kv(whole.of_worker(2), 11).nbytes == namespace.shard_nbytes(11)


@pytest.mark.parametrize(
    "kv",
    [
        torch.zeros(3, 2, 6, 4, 8),
        torch.zeros(3, 2, 5, 4, 8, dtype=torch.float16),
        torch.zeros(3, 2, 5, 8, 4),
        torch.zeros(5),
    ],
    ids=["token_count", "dtype", "order", "dimensions"],
)
def test_kv_that_does_not_fit_is_refused_with_both_shapes(kv: torch.Tensor) -> None:
    with pytest.raises(InvalidRequestError, match=r"5 tokens of this layout are torch.float32 \(3, 2, 5, 4, 8\)"):
        layout().check(kv, 5)

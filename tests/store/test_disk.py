"""LocalDiskBackend's files: what is written is read back bit by bit, or not at all."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from safetensors.numpy import load_file

from p2pkv.core.chunks import Chunk
from p2pkv.core.keys import DTYPE_NBYTES, ChunkKey, Identity, Namespace, chunk_key, namespace_digest, pack_tokens, root_key
from p2pkv.errors import ConfigError, DamagedFileError, UnreadableShardError
from p2pkv.store import memory, shard_file
from p2pkv.store.disk import DiskStore, open_disk_store

NAMESPACE = Namespace(
    model="tiny", weights="0", dtype="float32", layers=2, planes=2, kv_heads=4, head_dim=8, chunk_size=4, world_size=2
)
STAGE = "move"


def chunk_of(first: int = 0, namespace: Namespace = NAMESPACE) -> Chunk:
    tokens, parent = pack_tokens(range(first, first + 4)), root_key(namespace, Identity())
    shard_nbytes = (namespace.shard_nbytes(4),) * namespace.shard_count()
    return Chunk(chunk_key(parent, tokens), parent, namespace_digest(namespace), 0, tokens, shard_nbytes)


CHUNK = chunk_of()


class Warnings(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def warnings() -> Warnings:
    return Warnings()


@contextmanager
def sealed(payload: bytes) -> Iterator[int]:
    descriptor = memory.create(len(payload))
    os.pwrite(descriptor, payload.ljust(memory.page_rounded(len(payload)), b"\0"), 0)
    memory.seal(descriptor)
    yield descriptor
    os.close(descriptor)


def payload_of(chunk: Chunk, worker: int) -> bytes:
    return bytes((index * 7 + worker) % 251 for index in range(chunk.shard_nbytes[worker]))


async def hold(store: DiskStore, chunk: Chunk = CHUNK, namespace: Namespace = NAMESPACE) -> None:
    for worker in range(len(chunk.shard_nbytes)):
        with sealed(payload_of(chunk, worker)) as descriptor:
            await store.write(STAGE, chunk, namespace, worker, descriptor, None)
    store.admit(STAGE, chunk.key)


async def loaded(store: DiskStore, worker: int, chunk: Chunk = CHUNK) -> bytes:
    shard = await store.load(chunk.key, worker)
    try:
        memory.check_foreign(shard.descriptor, shard.nbytes)
        return os.pread(shard.descriptor, shard.nbytes, 0)
    finally:
        os.close(shard.descriptor)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def file_of(folder: Path, worker: int = 0, chunk: Chunk = CHUNK) -> Path:
    return folder / f"{chunk.key.hex()}-{worker}.safetensors"


async def test_what_is_written_outlives_the_store_and_comes_back_bit_by_bit(tmp_path: Path, warnings: Warnings) -> None:
    with open_disk_store(tmp_path / "made" / "here", chunk_size=4, warn=warnings) as disk:
        assert disk.found.chunks == ()
        await hold(disk.store)
    with open_disk_store(tmp_path / "made" / "here", chunk_size=4, warn=warnings) as disk:
        assert [each.chunk for each in disk.found.chunks] == [CHUNK]
        assert disk.found.namespaces == (NAMESPACE,)
        assert disk.store.shard_count(CHUNK.key) == 2
        assert [await loaded(disk.store, worker) for worker in (0, 1)] == [payload_of(CHUNK, worker) for worker in (0, 1)]
    assert warnings == []


@pytest.mark.parametrize("dtype", DTYPE_NBYTES)
async def test_every_dtype_has_a_file(tmp_path: Path, warnings: Warnings, dtype: str) -> None:
    namespace = Namespace("m", "0", dtype, layers=1, planes=2, kv_heads=2, head_dim=3, chunk_size=4, world_size=1)
    chunk = chunk_of(namespace=namespace)
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        await hold(disk.store, chunk, namespace)
        assert await loaded(disk.store, 0, chunk) == payload_of(chunk, 0)
        assert file_of(tmp_path, chunk=chunk).stat().st_size <= chunk.charged_file_nbytes


async def test_any_reader_of_safetensors_reads_it(tmp_path: Path, warnings: Warnings) -> None:
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        await hold(disk.store)
    tensor = load_file(file_of(tmp_path, worker=1))["kv"]
    assert (tensor.shape, tensor.dtype.name) == ((2, 2, 4, 2, 8), "float32")
    assert tensor.tobytes() == payload_of(CHUNK, 1)


async def test_the_longest_names_fit_in_what_a_file_is_charged(tmp_path: Path, warnings: Warnings) -> None:
    namespace = Namespace("\x01" * 512, "\x02" * 128, "int8", 4096, 2, 2, 1, chunk_size=4, world_size=1)
    chunk = chunk_of(namespace=namespace)
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        await hold(disk.store, chunk, namespace)
    assert file_of(tmp_path, chunk=chunk).stat().st_size <= chunk.charged_file_nbytes


def torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def headless(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"{}")


def of_another_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"p2pkv.shard.1", b"p2pkv.shard.2"))


def with_other_tokens(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(CHUNK.tokens.hex().encode(), CHUNK.tokens.hex().replace("01", "02").encode()))


def misnamed(path: Path) -> None:
    shutil.copy(path.with_name(path.name.replace("-0", "-1")), path)


@pytest.mark.parametrize("spoil", [torn, headless, emptied, foreign, of_another_version, with_other_tokens, misnamed])
async def test_a_wrong_file_is_set_aside(tmp_path: Path, warnings: Warnings, spoil: Callable[[Path], None]) -> None:
    other = chunk_of(50)
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        await hold(disk.store)
        await hold(disk.store, other)
    spoil(file_of(tmp_path))
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        assert [each.chunk for each in disk.found.chunks] == [other]
        assert await loaded(disk.store, 0, other) == payload_of(other, 0)
    assert len(warnings) == 2  # itself, and the other worker's shard, which is of no use alone
    assert len(list((tmp_path / "set-aside").iterdir())) == 2
    assert files(tmp_path) == [file_of(tmp_path, worker, other).name for worker in (0, 1)]


async def test_chunks_of_another_size_are_set_aside(tmp_path: Path, warnings: Warnings) -> None:
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        await hold(disk.store)
    with open_disk_store(tmp_path, chunk_size=8, warn=warnings) as disk:
        assert disk.found.chunks == ()
    assert "its chunks have 4 tokens, this instance's 8" in warnings[0]


async def test_bytes_that_have_changed_are_never_given_out(tmp_path: Path, warnings: Warnings) -> None:
    damaged: list[ChunkKey] = []
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        disk.store.report_damage_to(damaged.append)
        await hold(disk.store)
        with file_of(tmp_path).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xfe")
        with pytest.raises(UnreadableShardError, match="checksum"):
            await disk.store.load(CHUNK.key, 0)
        assert damaged == [CHUNK.key]
        assert files(tmp_path) == []
        disk.store.release([CHUNK.key])
        with pytest.raises(UnreadableShardError, match="isn't held any more"):
            await disk.store.load(CHUNK.key, 0)


async def test_a_file_that_vanished_is_damage_too(tmp_path: Path, warnings: Warnings) -> None:
    damaged: list[ChunkKey] = []
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        disk.store.report_damage_to(damaged.append)
        await hold(disk.store)
        file_of(tmp_path).unlink()
        with pytest.raises(UnreadableShardError, match="it is gone"):
            await disk.store.load(CHUNK.key, 0)
    assert damaged == [CHUNK.key]


def test_a_directory_serves_one_node_at_a_time(tmp_path: Path, warnings: Warnings) -> None:
    opened = open_disk_store(tmp_path, chunk_size=4, warn=warnings)
    with opened, pytest.raises(ConfigError, match="another node uses"):
        open_disk_store(tmp_path, chunk_size=4, warn=warnings).__enter__()
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings):
        pass


def test_a_directory_that_cant_be_used_is_an_error_of_the_configuration(tmp_path: Path, warnings: Warnings) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="local_disk"):
        open_disk_store(tmp_path / "file" / "under", chunk_size=4, warn=warnings).__enter__()


async def test_what_is_dropped_or_released_is_removed_from_the_disk(tmp_path: Path, warnings: Warnings) -> None:
    other = chunk_of(50)
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        await hold(disk.store)
        for worker in (0, 1):
            with sealed(payload_of(other, worker)) as descriptor:
                await disk.store.write(STAGE, other, NAMESPACE, worker, descriptor, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.store.keep_removing)
            disk.store.drop(STAGE, other.key, 0)
            disk.store.drop(STAGE, other.key)
            disk.store.drop(STAGE, other.key)
            disk.store.release([CHUNK.key])
            with trio.fail_after(5):
                while files(tmp_path):  # noqa: ASYNC110 - a directory has no event
                    await trio.sleep(0.005)
            nursery.cancel_scope.cancel()


async def test_what_is_let_go_of_is_removed_before_anything_is_written(tmp_path: Path, warnings: Warnings) -> None:
    other = chunk_of(50)
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        await hold(disk.store)
        disk.store.release([CHUNK.key])
        await hold(disk.store, other)
        assert files(tmp_path) == [file_of(tmp_path, worker, other).name for worker in (0, 1)]
        disk.store.release([other.key])
        await hold(disk.store, other)  # the same again: what was let go of isn't what is there now
        assert await loaded(disk.store, 1, other) == payload_of(other, 1)


async def test_a_full_disk_is_told_by_name_and_leaves_nothing(tmp_path: Path, warnings: Warnings) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        await hold(disk.store)
        with sealed(payload_of(CHUNK, 0)) as descriptor:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
            try:
                with pytest.raises(OSError, match="File too large") as caught:
                    await disk.store.write(STAGE, chunk_of(50), NAMESPACE, 0, descriptor, None)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert list((tmp_path / "writing").iterdir()) == []
        assert files(tmp_path) == [file_of(tmp_path, worker).name for worker in (0, 1)]
        assert await loaded(disk.store, 0) == payload_of(CHUNK, 0)
        await hold(disk.store, chunk_of(50))


async def test_drafts_of_a_node_that_died_are_gone_at_the_next_start(tmp_path: Path, warnings: Warnings) -> None:
    (tmp_path / "writing").mkdir()
    (tmp_path / "writing" / ".tmpABC").write_bytes(b"half")
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        assert list((tmp_path / "writing").iterdir()) == []
        assert disk.found.chunks == ()


async def test_a_file_of_another_shard_isnt_read_as_this_one(tmp_path: Path, warnings: Warnings) -> None:
    with open_disk_store(tmp_path, chunk_size=4, warn=warnings) as disk:
        await hold(disk.store)
    descriptor = memory.create(CHUNK.shard_nbytes[0])
    with pytest.raises(DamagedFileError, match="another shard's"):
        shard_file.read_payload(file_of(tmp_path, worker=1), CHUNK.key, 0, descriptor)
    os.close(descriptor)


def test_nothing_of_it_loads_torch() -> None:
    program = "import sys, p2pkv.store.disk, p2pkv.store.shard_file; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)

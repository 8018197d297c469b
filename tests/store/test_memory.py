import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pkv.errors import ForeignMemoryError, SealRefusedError
from p2pkv.store import memory

NBYTES = 3 * 4096 - 100


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def written(nbytes: int = NBYTES) -> int:
    """A memfd of ours, every byte written."""
    descriptor = memory.create(nbytes)
    with mmap.mmap(descriptor, nbytes) as view:
        view[:] = b"\x01" * nbytes
    return descriptor


def sealed(nbytes: int = NBYTES) -> int:
    descriptor = written(nbytes)
    memory.seal(descriptor)
    return descriptor


def test_fresh_memory_is_whole_pages_that_cannot_be_resized_or_inherited() -> None:
    with closing(memory.create(NBYTES)) as descriptor:
        assert os.fstat(descriptor).st_size == 3 * 4096
        assert not os.get_inheritable(descriptor)
        for nbytes in (0, 4 * 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, nbytes)


def test_sealed_memory_can_be_read_and_never_written_again() -> None:
    with closing(sealed()) as descriptor:
        with mmap.mmap(descriptor, NBYTES, prot=mmap.PROT_READ) as view:
            assert view[:] == b"\x01" * NBYTES
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, NBYTES)
        with (
            closing(os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)) as reopened,
            pytest.raises(PermissionError),
        ):
            os.pwrite(reopened, b"x", 0)


def test_memory_that_is_still_mapped_writable_is_not_sealed() -> None:
    with closing(written()) as descriptor:
        with mmap.mmap(descriptor, NBYTES), pytest.raises(SealRefusedError, match="maps it"):
            memory.seal(descriptor)
        memory.seal(descriptor)


def test_memory_with_a_hole_is_refused() -> None:
    with closing(memory.create(NBYTES)) as descriptor:
        os.pwrite(descriptor, b"\x01", 0)
        with pytest.raises(SealRefusedError, match="never written"):
            memory.seal(descriptor)


def test_what_we_sealed_is_accepted_from_another_process() -> None:
    with closing(sealed()) as descriptor:
        memory.check_foreign(descriptor, NBYTES)
        memory.check_foreign(descriptor, 3 * 4096)


@pytest.mark.parametrize("nbytes", [2 * 4096, 3 * 4096 + 1])
def test_memory_of_another_size_is_refused(nbytes: int) -> None:
    with closing(sealed()) as descriptor, pytest.raises(ForeignMemoryError, match="were announced"):
        memory.check_foreign(descriptor, nbytes)


@pytest.mark.parametrize(
    "missing", [fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE, memory.READ_ONLY_SEALS]
)
def test_memory_without_one_of_the_four_seals_is_refused(missing: int) -> None:
    with closing(os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as descriptor:
        os.pwrite(descriptor, b"\x01" * 4096, 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, memory.READ_ONLY_SEALS & ~missing)
        with pytest.raises(ForeignMemoryError, match="isn't sealed"):
            memory.check_foreign(descriptor, 4096)


def test_a_seal_against_future_writes_alone_is_refused() -> None:
    future_write = 0x10
    with closing(os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as descriptor:
        os.pwrite(descriptor, b"\x01" * 4096, 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, memory.READ_ONLY_SEALS & ~fcntl.F_SEAL_WRITE | future_write)
        with pytest.raises(ForeignMemoryError, match="isn't sealed"):
            memory.check_foreign(descriptor, 4096)


def test_sealed_memory_whose_blocks_are_not_allocated_is_refused() -> None:
    terabyte = 2**40
    with closing(memory.create(terabyte)) as descriptor:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, memory.READ_ONLY_SEALS)
        with pytest.raises(ForeignMemoryError, match="are allocated"):
            memory.check_foreign(descriptor, terabyte)


def test_sealed_memory_that_may_only_be_written_is_refused() -> None:
    with (
        closing(sealed()) as original,
        closing(os.open(f"/proc/self/fd/{original}", os.O_WRONLY)) as descriptor,
        pytest.raises(ForeignMemoryError, match="read from"),
    ):
        memory.check_foreign(descriptor, NBYTES)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_PATH])
def test_a_file_is_refused(tmp_path: Path, flags: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x01" * 4096)
    with closing(os.open(path, flags)) as descriptor, pytest.raises(ForeignMemoryError):
        memory.check_foreign(descriptor, 4096)


def test_a_file_in_shared_memory_is_refused() -> None:
    with closing(os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)) as descriptor:
        os.pwrite(descriptor, b"\x01" * 4096, 0)
        with pytest.raises(ForeignMemoryError, match="isn't sealed"):
            memory.check_foreign(descriptor, 4096)


def test_a_pipe_is_refused() -> None:
    reading, writing = os.pipe()
    with closing(reading), closing(writing), pytest.raises(ForeignMemoryError):
        memory.check_foreign(reading, 4096)

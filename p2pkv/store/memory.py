"""Chunk memory: memfds that several processes map, and the seals that make them safe to read.

A shard's memfd can neither shrink nor grow from its creation on, so nobody who maps it dies of a truncation. Its writer unmaps
it, then it is sealed against writing for good: `F_SEAL_WRITE` is refused while anyone still maps it writable, and no map,
`pwrite` or reopened descriptor changes it afterwards. Sealed memory alone is handed to readers.
"""

import errno
import fcntl
import os
import stat

from p2pkv.core.chunks import PAGE_NBYTES
from p2pkv.errors import ForeignMemoryError, SealRefusedError

MFD_NOEXEC_SEAL = 0x8
"""`linux/memfd.h`; `os` of Python 3.11 lacks it."""

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
READ_ONLY_SEALS = SIZE_SEALS | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

BLOCK_NBYTES = 512
"""Unit of `st_blocks`, whatever the file system."""


def page_rounded(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages: the size of the memfd that holds them."""
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


def create(nbytes: int) -> int:
    """A fresh memfd for `nbytes` bytes, rounded up to pages: empty blocks, its size sealed, not inherited by children.

    Args:
        nbytes: At least 1; an empty memfd can't be mapped.

    Returns:
        Its descriptor, which the caller owns.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        descriptor = os.memfd_create("p2pkv", flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # kernels before 6.3 don't know the flag
            raise
        descriptor = os.memfd_create("p2pkv", flags)
    try:
        os.ftruncate(descriptor, page_rounded(nbytes))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SIZE_SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def seal(descriptor: int) -> None:
    """Make our own memfd read-only for good.

    Raises:
        SealRefusedError: Someone still maps it writable, or parts of it were never written. It may be sealed nevertheless.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise SealRefusedError("its writer still maps it; drop every view of it and unmap it before the commit") from error
    if not _is_allocated(os.fstat(descriptor)):  # only now: until it is sealed, its writer could punch holes
        raise SealRefusedError("parts of it were never written")


def check_foreign(descriptor: int, nbytes: int) -> None:
    """Check that a descriptor from another process is memory as we would have sealed it ourselves.

    Args:
        descriptor: Stays the caller's.
        nbytes: Payload that was announced.

    Raises:
        ForeignMemoryError: It isn't a readable memfd with all four seals, of the exact size, its blocks allocated.
    """
    try:
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:  # EINVAL: not memory; EBADF: a mere O_PATH handle
        raise ForeignMemoryError(f"the descriptor is no memfd: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or seals & READ_ONLY_SEALS != READ_ONLY_SEALS:
        raise ForeignMemoryError(f"the memory isn't sealed: seals {seals:#x}, needed {READ_ONLY_SEALS:#x}")
    if access == os.O_WRONLY:
        raise ForeignMemoryError("the descriptor can't be read from")
    if status.st_size != page_rounded(nbytes):
        raise ForeignMemoryError(f"the memory has {status.st_size} bytes, {page_rounded(nbytes)} were announced")
    if not _is_allocated(status):
        raise ForeignMemoryError(f"only {status.st_blocks * BLOCK_NBYTES} of the memory's {status.st_size} bytes are allocated")


def _is_allocated(status: os.stat_result) -> bool:
    return status.st_blocks * BLOCK_NBYTES >= status.st_size

"""A shard as a file: one safetensors tensor, `kv`, and in its metadata all that tells what it is.

Any program that reads safetensors can read it. `Label` is the metadata: with it alone the index is rebuilt. A file is right
when its label fits the format, its chunk follows from that (key from parent and tokens, size from the layout), and its payload
has the label's checksum. The first two are checked when a directory is read, the last each time that the payload is.
"""

import errno
import os
import re
from dataclasses import dataclass
from functools import cache, cached_property
from mmap import MAP_PRIVATE, PROT_READ, mmap
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le, Len
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from xxhash import xxh3_128

from p2pkv.core.chunks import Chunk
from p2pkv.core.keys import MAX_TOKENS, TOKEN_NBYTES, ChunkKey, Namespace, namespace_digest, token_count
from p2pkv.errors import DamagedFileError

TENSOR, METADATA = "kv", "p2pkv"
SLICE_NBYTES = 256 * 1024
"""Read and written in one call; it fits in a second-level cache."""
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
}
"""The format's names of `DTYPE_NBYTES`."""
_HEADER_MAX_NBYTES = 2**20
"""Longer than any of ours."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class Label:
    """What a file is.

    Attributes:
        format: Of this label.
        namespace: Of the chunk.
        key: Of the chunk.
        parent: Key of the chunk before, or the root, which stands for the request's identity.
        start: Tokens before the chunk in its prompt.
        tokens: The chunk's own.
        worker: Whose shard it is.
        checksum: xxh3_128 of the payload.
    """

    format: Literal["p2pkv.shard.1"]
    namespace: Namespace
    key: ChunkKey
    parent: ChunkKey
    start: Annotated[int, Ge(0), Le(MAX_TOKENS)]
    tokens: Annotated[bytes, Len(TOKEN_NBYTES, 65536 * TOKEN_NBYTES)]
    worker: Annotated[int, Ge(0), Le(1023)]
    checksum: Annotated[bytes, Len(16, 16)]

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", val_json_bytes="hex", ser_json_bytes="hex")

    @classmethod
    def of(cls, chunk: Chunk, namespace: Namespace, worker: int, checksum: bytes) -> "Label":
        """The label of a chunk's shard."""
        return cls("p2pkv.shard.1", namespace, chunk.key, chunk.parent, chunk.start, chunk.tokens, worker, checksum)

    @cached_property
    def chunk(self) -> Chunk:
        """The chunk that it is a shard of."""
        shard_nbytes = (self.namespace.shard_nbytes(token_count(self.tokens)),) * self.namespace.shard_count()
        digest = namespace_digest(self.namespace)
        return Chunk(self.key, self.parent, digest, self.start, self.tokens, shard_nbytes)

    @property
    def shape(self) -> list[int]:
        """Of the tensor."""
        namespace = self.namespace
        heads = namespace.kv_heads // namespace.shard_count()
        return [namespace.layers, namespace.planes, self.chunk.token_count, heads, namespace.head_dim]

    def problem(self) -> str | None:
        """Why nothing can be a shard like this; None when it can be."""
        problem = self.namespace.problem() or self.chunk.problem(self.namespace)
        if problem is None and self.worker >= self.namespace.shard_count():
            problem = f"there is no worker {self.worker} among {self.namespace.shard_count()}"
        return problem


@cache
def _adapter() -> TypeAdapter[Label]:
    return TypeAdapter(Label)


def checksum_of(descriptor: int, nbytes: int) -> bytes:
    """The xxh3_128 of sealed memory."""
    digest = xxh3_128()
    with mmap(descriptor, nbytes, flags=MAP_PRIVATE, prot=PROT_READ) as mapped, memoryview(mapped) as payload:
        for offset in range(0, nbytes, SLICE_NBYTES):
            with payload[offset : offset + SLICE_NBYTES] as piece:
                digest.update(piece)
    return digest.digest()


def write(path: Path, label: Label, descriptor: int) -> None:
    """Write a shard's file anew and bring it to the disk; the caller fsyncs the directory that it ends up in.

    Args:
        path: Of the new file. What the library puts beside it on the way goes when all goes well.
        label: What it is.
        descriptor: Of sealed memory that begins with the payload; the caller keeps it open until this returns.

    Raises:
        OSError: The disk is full, or doesn't do its work.
    """
    nbytes = label.chunk.shard_nbytes[label.worker]
    with mmap(descriptor, nbytes, flags=MAP_PRIVATE, prot=PROT_READ) as mapped:
        payload = np.frombuffer(mapped, np.uint8)
        spec = TensorSpec(dtype=label.namespace.dtype, shape=label.shape, data_ptr=payload.ctypes.data, data_len=nbytes)
        try:
            serialize_file({TENSOR: spec}, path, {METADATA: _adapter().dump_json(label).decode()})
        except SafetensorError as error:
            raise _os_error(error, path) from error
        finally:
            del payload  # a map with a view on it can't be closed
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _os_error(error: SafetensorError, path: Path) -> OSError:
    """The library has the system's error number in its text only."""
    number = _OS_ERROR.search(str(error))
    code = errno.EIO if number is None else int(number[1])
    return OSError(code, os.strerror(code), str(path))


def read_label(path: Path) -> Label:
    """What a file says that it is.

    Raises:
        DamagedFileError: It isn't a whole shard's file of this format.
        OSError: It can't be read.
    """
    with path.open("rb") as readable:  # what can't be read is an error here; the library maps it, and would die of a signal
        readable.read(min(int.from_bytes(readable.read(8), "little"), _HEADER_MAX_NBYTES))
    try:
        with safe_open(path, "numpy") as opened:
            metadata, names = opened.metadata() or {}, list(opened.keys())
            if names != [TENSOR] or METADATA not in metadata:
                raise DamagedFileError("it is no shard of p2pkv's")
            tensor = opened.get_slice(TENSOR)
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
        label = _adapter().validate_json(metadata[METADATA])
    except SafetensorError as error:
        raise DamagedFileError(str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise DamagedFileError(f"its label is wrong at {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    problem = label.problem()
    if problem is None and (shape, dtype) != (label.shape, _DTYPES[label.namespace.dtype]):
        problem = f"its tensor is {dtype} {shape}, its label needs {_DTYPES[label.namespace.dtype]} {label.shape}"
    if problem is not None:
        raise DamagedFileError(problem)
    return label


def read_payload(path: Path, key: ChunkKey, worker: int, descriptor: int) -> bytes:
    """Read a shard's payload into its memory.

    Args:
        path: Of its file.
        key: Which chunk it must be of.
        worker: Which shard it must be.
        descriptor: Of memory for the payload; nobody else uses it until this returns.

    Returns:
        Its checksum, which is right.

    Raises:
        DamagedFileError: It isn't as it was written, or is another.
        OSError: It can't be read.
    """
    label = read_label(path)
    if (label.key, label.worker) != (key, worker):
        raise DamagedFileError("it is another shard's")
    nbytes = label.chunk.shard_nbytes[worker]
    digest, buffer = xxh3_128(), memoryview(bytearray(SLICE_NBYTES))
    with path.open("rb", buffering=0) as readable:
        readable.seek(-nbytes, os.SEEK_END)  # the tensor is the only one, so it is the file's end
        offset = 0
        while offset < nbytes and (count := readable.readinto(buffer[: nbytes - offset])):
            digest.update(buffer[:count])
            written = 0
            while written < count:
                written += os.pwrite(descriptor, buffer[written:count], offset + written)
            offset += count
    if offset < nbytes or digest.digest() != label.checksum:
        raise DamagedFileError("its payload doesn't have the checksum that it was written with")
    return label.checksum

"""LocalDiskBackend's bytes: one safetensors file for each shard, staged or resident, in a directory of this instance alone.

    KEY-WORKER.safetensors      a shard, whole and on the disk
    writing/                    shards that are being written; emptied at each start
    set-aside/                  files that aren't what they should be, for people to look at
    lock                        held while a node uses the directory

A shard is written in `writing/`, brought to the disk, renamed, and the directory is brought to the disk: from then on it
outlives the node, staged or resident. So a move that a crash interrupts leaves a duplicate at worst. Files that are let go of
are removed soon, and before anything else is written, so that the limit holds for files too.

The core decides what is held. All here but the threads' work belongs on the event loop.
"""

import fcntl
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import trio

from p2pkv.core.chunks import Chunk
from p2pkv.core.events import ChunksFound, KeptChunk
from p2pkv.core.ids import Location, StageId
from p2pkv.core.keys import ChunkKey, Namespace
from p2pkv.errors import ConfigError, DamagedFileError, UnreadableShardError
from p2pkv.store import memory, shard_file
from p2pkv.store.cpu import Shard
from p2pkv.store.shard_file import Label

READERS = 4
"""Threads that read at the same time: a fast disk gives more to several."""
SUFFIX = ".safetensors"

Warn = Callable[[str], None]
Damaged = Callable[[ChunkKey], None]


@dataclass(frozen=True, slots=True)
class _File:
    """One shard's file, and the size of its payload."""

    path: Path
    nbytes: int


_Files = dict[int, _File]
"""By worker."""


class DiskStore:
    """Files by chunk key and worker. `open_disk_store` makes it.

    Args:
        folder: Locked, and all in order.
        resident: The chunks that are there.
        warn: Told, in sentences, what people should know.
    """

    def __init__(self, folder: Path, resident: dict[ChunkKey, _Files], warn: Warn) -> None:
        self._folder = folder
        self._resident = resident
        self._staged: dict[tuple[StageId, ChunkKey], _Files] = {}
        self._warn = warn
        self._damaged: Damaged = lambda _key: None
        self._removed: deque[Path] = deque()
        self._some_removed = trio.Event()
        self._one_writer = trio.CapacityLimiter(1)
        self._readers = trio.CapacityLimiter(READERS)

    def report_damage_to(self, damaged: Damaged) -> None:
        """Who is told of resident chunks that aren't as they were written; their files have been set aside by then."""
        self._damaged = damaged

    # --- files ------------------------------------------------------------------------------------------------------------

    async def write(
        self, stage: StageId, chunk: Chunk, namespace: Namespace, worker: int, descriptor: int, checksum: bytes | None
    ) -> bytes:
        """Stage a shard: write its sealed memory to a file that outlives this node.

        Cancelled, it leaves the shard staged or nothing.

        Returns:
            Its checksum: `checksum`, or where that isn't known yet, as it is now.

        Raises:
            OSError: The disk is full, or doesn't do its work. Nothing is staged.
        """
        path = self._folder / f"{chunk.key.hex()}-{worker}{SUFFIX}"
        nbytes = chunk.shard_nbytes[worker]
        held = os.dup(descriptor)  # for the thread, as its owner may close it

        def write() -> bytes:
            self._remove_waiting()
            known = checksum or shard_file.checksum_of(held, nbytes)
            draft = self._folder / "writing" / path.name
            try:
                shard_file.write(draft, Label.of(chunk, namespace, worker, known), held)
                draft.replace(path)
                _sync(self._folder)
            except OSError:
                with suppress(OSError):  # the first error counts
                    for each in (*draft.parent.iterdir(), path):
                        each.unlink(missing_ok=True)
                raise
            return known

        try:
            known = await trio.to_thread.run_sync(write, limiter=self._one_writer)
        finally:
            os.close(held)
        self._staged.setdefault((stage, chunk.key), {})[worker] = _File(path, nbytes)
        return known

    def shard_count(self, key: ChunkKey) -> int:
        """Shards of a resident chunk; 0 of any other."""
        return len(self._resident.get(key, ()))

    async def load(self, key: ChunkKey, worker: int) -> Shard:
        """A resident shard in fresh sealed memory, its checksum checked; the descriptor is the caller's.

        Raises:
            UnreadableShardError: It isn't held any more, can't be read, or isn't as it was written.
        """
        files = self._resident.get(key, {})
        if worker not in files:
            raise UnreadableShardError("it isn't held any more")
        file = files[worker]
        try:
            return await trio.to_thread.run_sync(_load, file, key, worker, limiter=self._readers)
        except (DamagedFileError, FileNotFoundError) as error:
            reason = "it is gone" if isinstance(error, FileNotFoundError) else str(error)
            if self._resident.get(key) is files:  # else it was let go of meanwhile, and removed
                self._give_up(key, reason)
            raise UnreadableShardError(f"{file.path.name} is damaged: {reason}") from error
        except OSError as error:
            self._warn(f"{file.path} can't be read: {error.strerror}")
            raise UnreadableShardError(f"{file.path.name} can't be read: {error.strerror}") from error

    def _give_up(self, key: ChunkKey, reason: str) -> None:
        for file in self._resident[key].values():
            with suppress(FileNotFoundError):
                set_aside(file.path, reason, self._warn)
        self._damaged(key)

    # --- what the core orders ---------------------------------------------------------------------------------------------

    def admit(self, stage: StageId, key: ChunkKey) -> None:
        """Make a staged chunk resident."""
        self._resident[key] = self._staged.pop((stage, key))

    def drop(self, stage: StageId, key: ChunkKey, worker: int | None = None) -> None:
        """Remove a staged chunk, or only one worker's shard. What isn't staged (any more) needs no dropping."""
        files = self._staged.get((stage, key), {})
        workers = list(files) if worker is None else [worker]
        self._remove_soon(files.pop(each) for each in workers if each in files)
        if not files:
            self._staged.pop((stage, key), None)

    def release(self, keys: Iterable[ChunkKey]) -> None:
        """Remove resident chunks."""
        for key in keys:
            self._remove_soon(self._resident.pop(key).values())

    def _remove_soon(self, files: Iterable[_File]) -> None:
        self._removed.extend(file.path for file in files)
        self._some_removed.set()

    # --- removing ---------------------------------------------------------------------------------------------------------

    async def keep_removing(self) -> None:
        """Remove what was let go of, until cancelled; what is left then is removed by `remove_waiting`."""
        while True:
            await self._some_removed.wait()
            self._some_removed = trio.Event()
            await trio.to_thread.run_sync(self._remove_waiting, limiter=self._one_writer)

    def remove_waiting(self) -> None:
        """Remove what waits, and what is staged, here and now: for who ends, once `keep_removing` has."""
        for files in self._staged.values():
            self._remove_soon(files.values())
        self._staged.clear()
        self._remove_waiting()

    def _remove_waiting(self) -> None:
        while self._removed:
            path = self._removed.popleft()
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._warn(f"{path} can't be removed, and takes up room beyond the limit: {error.strerror}")


def _load(file: _File, key: ChunkKey, worker: int) -> Shard:
    with ExitStack() as unfinished:
        descriptor = memory.create(file.nbytes)
        unfinished.callback(os.close, descriptor)
        checksum = shard_file.read_payload(file.path, key, worker, descriptor)
        memory.seal(descriptor)
        unfinished.pop_all()
    return Shard(descriptor, file.nbytes, is_sealed=True, checksum=checksum)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: Path, reason: str, warn: Warn) -> None:
    """Put a file where it is never loaded from; people may look at it, and delete it."""
    folder = path.parent / "set-aside"
    folder.mkdir(mode=0o700, exist_ok=True)
    path.replace(folder / path.name)
    warn(f"{path} isn't loaded, and was set aside in {folder}: {reason}")


# --- opening --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenedDisk:
    """A directory in use, and what was there; last used means written."""

    store: DiskStore
    found: ChunksFound


@contextmanager
def open_disk_store(folder: Path, *, chunk_size: int, warn: Warn) -> Iterator[OpenedDisk]:
    """Lock a directory, make it if need be, and read what is there; blocks for as long as that takes.

    Args:
        folder: The directory.
        chunk_size: Chunks of another size are of no use here; they are set aside.
        warn: As `DiskStore` has it.

    Raises:
        ConfigError: The directory can't be used, or another node uses it.
    """
    with _locked(folder):
        try:
            resident, found = _whole_chunks(_read_labels(folder, chunk_size, warn), warn)
        except OSError as error:
            raise ConfigError(f"local_disk: {folder} can't be used: {error}") from error
        store = DiskStore(folder, resident, warn)
        try:
            yield OpenedDisk(store, found)
        finally:
            store.remove_waiting()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"local_disk: {folder} can't be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"local_disk: another node uses {folder}; each instance needs a directory of its own") from error
        rmtree(folder / "writing", ignore_errors=True)
        (folder / "writing").mkdir(mode=0o700, exist_ok=True)
        yield
    finally:
        os.close(descriptor)


def _read_labels(folder: Path, chunk_size: int, warn: Warn) -> dict[Path, Label]:
    labels: dict[Path, Label] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            if path.is_symlink() or not path.is_file():
                raise DamagedFileError("it is no file")
            label = shard_file.read_label(path)
            if label.namespace.chunk_size != chunk_size:
                raise DamagedFileError(f"its chunks have {label.namespace.chunk_size} tokens, this instance's {chunk_size}")
            if path.name != f"{label.key.hex()}-{label.worker}{SUFFIX}":
                raise DamagedFileError("its name is that of another shard")
        except (DamagedFileError, OSError) as error:
            set_aside(path, str(error), warn)
        else:
            labels[path] = label
    return labels


def _whole_chunks(labels: dict[Path, Label], warn: Warn) -> tuple[dict[ChunkKey, _Files], ChunksFound]:
    """The chunks of which all shards are there; the other files are set aside."""
    by_key: defaultdict[ChunkKey, _Files] = defaultdict(dict)
    for path, label in labels.items():
        by_key[label.key][label.worker] = _File(path, label.chunk.shard_nbytes[label.worker])
    resident: dict[ChunkKey, _Files] = {}
    namespaces: dict[Namespace, None] = {}
    found: list[KeptChunk] = []
    now = time.time()
    for key, files in by_key.items():
        label = labels[next(iter(files.values())).path]
        if len(files) < len(label.chunk.shard_nbytes):
            for file in files.values():
                set_aside(file.path, "shards of its chunk's other workers aren't there", warn)
            continue
        resident[key] = files
        written_at = max(file.path.stat().st_mtime for file in files.values())
        namespaces[label.namespace] = None
        found.append(KeptChunk(label.chunk, idle_s=max(0.0, now - written_at)))
    found.sort(key=lambda each: (-each.idle_s, -each.chunk.start))
    return resident, ChunksFound(Location.LOCAL_DISK, tuple(namespaces), tuple(found))

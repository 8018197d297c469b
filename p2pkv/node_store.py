"""What a node keeps chunks in: how its stores are opened, and kept going."""

import resource
from contextlib import ExitStack

import trio

from p2pkv.config import NodeConfig
from p2pkv.core.events import ChunksDamaged
from p2pkv.core.ids import Location
from p2pkv.net.disk_fetch import DiskFetcher
from p2pkv.net.driver import Driver, Fetcher, Memory
from p2pkv.net.logs import logger
from p2pkv.store.cpu import CpuStore
from p2pkv.store.disk import OpenedDisk, open_disk_store
from p2pkv.store.prefaulted import PrefaultedMemory

SPARE_DESCRIPTORS = 1024
"""Of the limit on open files: for sockets, for descriptors on their way, and for the interpreter. Shards get the rest."""

_log = logger("node")


def raise_descriptor_limit() -> int:
    """Raise this process's limit on open files as far as it may, and say how many of them shards may use."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(hard - SPARE_DESCRIPTORS, hard // 2)


async def keep_memory_ready(prefaulted: PrefaultedMemory) -> None:
    """Have memory faulted in ahead, until cancelled, or until the system has no more."""
    try:
        await prefaulted.keep_ready()
    except OSError as error:
        _log.warning("no more memory is faulted in ahead, so transfers over TCP take longer", reason=str(error))


async def open_disk(config: NodeConfig, stack: ExitStack) -> OpenedDisk | None:
    """Open LocalDiskBackend, if there is one, until `stack` ends: to read a large directory takes a while.

    Raises:
        ConfigError: The directory can't be used, or another node uses it.
    """
    if config.local_disk is None:
        return None
    opening = open_disk_store(config.local_disk, chunk_size=config.chunk_size, warn=_log.warning)
    return await trio.to_thread.run_sync(stack.enter_context, opening)


def locations(store: CpuStore, disk: OpenedDisk | None, lanes: Fetcher) -> tuple[dict[Location, Memory], Fetcher]:
    """The stores by their locations, and who fetches chunks into any of them."""
    if disk is None:
        return {Location.LOCAL_CPU: store}, lanes
    return {Location.LOCAL_CPU: store, Location.LOCAL_DISK: disk.store}, DiskFetcher(store, disk.store, lanes)


def tell_of_disk(disk: OpenedDisk, driver: Driver) -> None:
    """Tell the machine what was found on disk, and from now on what turns out damaged."""
    disk.store.report_damage_to(lambda key: driver.handle(ChunksDamaged(Location.LOCAL_DISK, (key,))))
    driver.handle(disk.found)

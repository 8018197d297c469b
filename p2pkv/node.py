"""A node, put together: the machine, its memory, its links and lanes, and its doors, from one configuration."""

import os
import resource
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from p2pkv.config import NodeConfig, parse_address
from p2pkv.core.config import MachineConfig
from p2pkv.core.events import LeaveRequested, SiblingsFound
from p2pkv.core.ids import Address
from p2pkv.core.machine import Machine
from p2pkv.core.records import LaneAddress
from p2pkv.errors import ConfigError, PortInUseError, failure_error
from p2pkv.net.descriptors import open_unix_listener
from p2pkv.net.driver import Driver
from p2pkv.net.engine_door import EngineDoor
from p2pkv.net.handoff import HandoffFetcher, serve_handoffs
from p2pkv.net.http.server import serve_http
from p2pkv.net.links import PEER_PATH, PeerLinks
from p2pkv.net.logs import configure_logs, logger
from p2pkv.net.ports import address_of, listen_on, reserve
from p2pkv.net.websockets import serve_websockets
from p2pkv.rendezvous import NodeCard, Place, claim, living_cards, place_of, publish, runtime_directory
from p2pkv.store.cpu import CpuStore

SPARE_DESCRIPTORS = 1024
"""Of the limit on open files: for sockets, for descriptors on their way, and for the interpreter. Shards get the rest."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Names this host, as it is since its boot: processes that read the same id can pass each other descriptors."""

_log = logger("node")


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """Where a node's doors are.

    Attributes:
        ws: Its websocket door.
        http: URL of its own HTTP shim.
        transfer: `host:port` of its transfer address.
        shared: URL of the shared HTTP port if this node serves it; None when it doesn't.
    """

    ws: Address
    http: str
    transfer: str
    shared: str | None


class Node:
    """A running node. `open_node` makes it."""

    def __init__(self, config: NodeConfig, addresses: NodeAddresses, driver: Driver) -> None:
        self.config = config
        self.addresses = addresses
        self.driver = driver

    async def leave(self) -> None:
        """Leave the cluster: no new moves, open ones are finished or restored, then everybody is told; `leave_s` at most."""
        self.driver.handle(LeaveRequested())
        with trio.move_on_after(self.config.leave_s):
            await self.driver.wait_stopped()


@asynccontextmanager
async def open_node(config: NodeConfig, environ: Mapping[str, str] = os.environ) -> AsyncIterator[Node]:
    """Run an instance's node; it is ready on entry, and leaves the cluster on exit, within about `leave_s`.

    Args:
        config: Of the instance.
        environ: Says where the runtime directory is.

    Raises:
        ConfigError: The system, the runtime directory or a port isn't fit. Nothing was started.
        InstanceIdInUseError: A living node has this name; on another host, that may turn out only after entry, and then
            cancels the body.
        ExceptionGroup: Of what the body raised, as its nursery has it.
    """
    if sys.platform != "linux":
        raise ConfigError("A node needs Linux: it keeps chunks in memfds and passes them over unix sockets.")
    configure_logs()
    for warning in config.warnings:
        _log.warning(warning)
    directory = runtime_directory(environ)
    place = place_of(directory, config.cluster, config.lmcache_instance_id)
    with ExitStack() as stack:
        last = stack.enter_context(claim(place))
        ports = _bind_ports(config, stack, living_cards(directory, config.cluster))
        generation = max(time.time_ns() // 1_000_000, last.generation + 1 if last else 0)
        parts = _assemble(config, place, ports, generation)
        stack.callback(parts.store.close)
        async with trio.open_nursery() as nursery:
            await nursery.start(parts.driver.run)
            nursery.start_soon(_cancel_when_refused, parts.driver, nursery.cancel_scope)
            await _open_doors(parts, nursery)
            _join(parts, directory)
            node = Node(config, ports.addresses, parts.driver)
            try:
                yield node
            finally:
                with trio.CancelScope(shield=True):
                    await node.leave()
                    await parts.links.close_all("this node leaves")
                nursery.cancel_scope.cancel()
        if (failure := await parts.driver.wait_stopped()) is not None:
            raise failure_error(failure)


async def _cancel_when_refused(driver: Driver, scope: trio.CancelScope) -> None:
    if await driver.wait_stopped() is not None:
        scope.cancel()


# --- parts ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a node is made of."""

    config: NodeConfig
    place: Place
    ports: "_Ports"
    store: CpuStore
    links: PeerLinks
    driver: Driver


def _assemble(config: NodeConfig, place: Place, ports: "_Ports", generation: int) -> _Parts:
    lane = LaneAddress(host_id=BOOT_ID.read_text(encoding="ascii").strip(), path=str(place.lane_socket))
    machine_config = MachineConfig(
        instance=config.lmcache_instance_id,
        generation=generation,
        cluster=config.cluster,
        ws=ports.addresses.ws,
        http=ports.addresses.http,
        transfer=ports.addresses.transfer,
        lane=lane,
        zone=config.zone,
        chunk_size=config.chunk_size,
        cpu_limit_nbytes=config.cpu_limit_nbytes,
        descriptor_limit=_raise_descriptor_limit(),
        move_deadline_s=config.move_deadline_s,
        lease_s=config.lease_s,
        leave_s=config.leave_s,
        wall_offset_s=time.time() - trio.current_time(),
    )
    # Tickets come from this generator: a seeded one would give itself away in the ids of 312 events.
    machine = Machine(machine_config, secrets.SystemRandom(), trio.current_time())
    store, links = CpuStore(), PeerLinks()
    driver = Driver(machine, memory=store, links=links, fetcher=HandoffFetcher(store, lane.host_id))
    return _Parts(config=config, place=place, ports=ports, store=store, links=links, driver=driver)


def _raise_descriptor_limit() -> int:
    """Raise this process's limit on open files as far as it may, and say how many of them shards may use."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(hard - SPARE_DESCRIPTORS, hard // 2)


async def _open_doors(parts: _Parts, nursery: trio.Nursery) -> None:
    config, place, ports, driver = parts.config, parts.place, parts.ports, parts.driver
    lane_listener = trio.SocketListener(open_unix_listener(place.lane_socket))
    await nursery.start(serve_handoffs, lane_listener, driver.machine.lane_grant, parts.store)
    engine_door = EngineDoor(driver, parts.store, chunk_size=config.chunk_size, cache_epoch=str(config.cache_epoch))
    await nursery.start(engine_door.serve, open_unix_listener(place.engine_socket))
    ws_listener = trio.SocketListener(trio.socket.from_stdlib_socket(ports.ws))
    routes = {PEER_PATH: partial(parts.links.accept, report=driver.handle)}
    await nursery.start(serve_websockets, ws_listener, routes, ports.numbers)
    await nursery.start(serve_http, driver, [port for port in (ports.http, ports.shared) if port is not None])


def _join(parts: _Parts, directory: Path) -> None:
    """Let the other nodes of this host find this one, and dial them and all contacts."""
    config, addresses = parts.config, parts.ports.addresses
    found = list(config.contacts)
    if config.enable_controller:
        card = NodeCard(
            instance=config.lmcache_instance_id,
            generation=parts.driver.machine.config.generation,
            pid=os.getpid(),
            ws=str(addresses.ws),
            http=addresses.http,
            transfer=addresses.transfer,
            shared=addresses.shared,
        )
        publish(parts.place, card)  # before looking: of two that start together, at least one finds the other
        for sibling in living_cards(directory, config.cluster):
            if sibling.instance == card.instance:
                continue
            try:
                found.append(parse_address(sibling.ws))
            except ValueError as error:
                _log.warning("a node of this host shows no address", instance=sibling.instance, reason=str(error))
    parts.driver.handle(SiblingsFound(tuple(found)))


# --- ports ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ports:
    """A node's TCP sockets, and what they are called."""

    ws: socket.socket
    http: socket.socket
    shared: socket.socket | None
    addresses: NodeAddresses

    @property
    def numbers(self) -> frozenset[int]:
        """Ports of all doors."""
        return frozenset(port.getsockname()[1] for port in (self.ws, self.http, self.shared) if port is not None)


def _bind_ports(config: NodeConfig, stack: ExitStack, siblings: list[NodeCard]) -> _Ports:
    ws = stack.enter_context(listen_on(config.bind_host, config.lmcache_worker_port, key="lmcache_worker_port"))
    http = stack.enter_context(listen_on(config.bind_host, config.http_port or 0, key="http_port"))
    wanted = config.distributed_url
    transfer_host, transfer_port = (config.bind_host, 0) if wanted is None else (wanted.host, wanted.port)
    transfer = stack.enter_context(reserve(transfer_host, transfer_port, key="distributed_url"))
    shared = _bind_shared(config, siblings)
    if shared is not None:
        stack.enter_context(shared)
    addresses = NodeAddresses(
        ws=config.ws_address,
        http=f"http://{address_of(http, config.advertise_host)}",
        transfer=str(address_of(transfer, transfer_host if wanted else config.advertise_host)),
        shared=None if shared is None else f"http://{config.controller_http_url}",
    )
    return _Ports(ws=ws, http=http, shared=shared, addresses=addresses)


def _bind_shared(config: NodeConfig, siblings: list[NodeCard]) -> socket.socket | None:
    """The compatible HTTP port, if this node shall serve it and can: it belongs to the first node of the host."""
    if not config.enable_controller:
        return None
    where = config.controller_http_url
    try:
        return listen_on(where.host, where.port, key="controller_http_url")
    except PortInUseError as error:
        holder = next((sibling.instance for sibling in siblings if sibling.shared == f"http://{where}"), None)
        if holder is None:
            _log.warning("this node goes on without the compatible HTTP port", reason=str(error))
        else:
            _log.info("another node serves the compatible HTTP port", port=where.port, instance=holder)
        return None

"""A node, put together: the machine, its memory, its links and lanes, and its doors, from one configuration."""

import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from p2pkv.cluster_key import Purpose, configured_key, user_key
from p2pkv.config import NodeConfig, is_loopback, parse_address
from p2pkv.core.config import MachineConfig
from p2pkv.core.events import LeaveRequested
from p2pkv.core.ids import Address
from p2pkv.core.machine import Machine
from p2pkv.core.messages import PROTOCOL_VERSION
from p2pkv.core.records import HandoffAddress
from p2pkv.errors import ConfigError, failure_error
from p2pkv.net.access import AccessTokens, DoorGuard
from p2pkv.net.control import CONTROL_PATH, ControlDoor
from p2pkv.net.descriptors import open_unix_listener
from p2pkv.net.dial_rules import DialRules, networks_of
from p2pkv.net.driver import Driver
from p2pkv.net.engine_door import EngineDoor
from p2pkv.net.handoff import HandoffFetcher, serve_handoffs
from p2pkv.net.http.server import guarded_app, serve_http
from p2pkv.net.joining import keep_joining
from p2pkv.net.lanes import RouteFetcher
from p2pkv.net.links import PEER_PATH, PeerLinks
from p2pkv.net.logs import configure_logs, logger
from p2pkv.net.names import dialable, is_of_this_host, resolve
from p2pkv.net.ports import address_of, listen_on
from p2pkv.net.proof import Prover
from p2pkv.net.shared_ports import SharedPorts
from p2pkv.net.tcp_lane import RateLimit
from p2pkv.net.tcp_source import serve_tcp
from p2pkv.net.tcp_target import TcpFetcher
from p2pkv.net.websockets import WebsocketHandler, serve_websockets
from p2pkv.node_store import keep_memory_ready, locations, open_disk, raise_descriptor_limit, tell_of_disk
from p2pkv.rendezvous import (
    NodeCard,
    Place,
    claim,
    living_cards,
    living_places,
    place_of,
    publish,
    runtime_directory,
    user_folder,
)
from p2pkv.store.closing import ClosingThread
from p2pkv.store.cpu import CpuStore
from p2pkv.store.disk import DiskStore, OpenedDisk
from p2pkv.store.prefaulted import PrefaultedMemory
from p2pkv.wire.limits import MIB
from p2pkv.wire.proof import Who

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Names this host, as it is since its boot: processes that read the same id can pass each other descriptors."""

_log = logger("node")


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """Where a node's doors are.

    Attributes:
        ws: Its websocket door.
        http: URL of its own HTTP shim.
        transfer: Its transfer address.
        shared: URL of the shared HTTP port if this node serves it; None when it doesn't.
    """

    ws: Address
    http: str
    transfer: Address
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
        ports = await _open_ports(config, stack, partial(_sibling_sockets, place, directory))
        generation = max(time.time_ns() // 1_000_000, last.generation + 1 if last else 0)
        disk = await open_disk(config, stack)
        parts = _assemble(config, place, ports, generation, await _secure(config, ports, generation, environ), disk)
        stack.callback(parts.closing.close_waiting)
        stack.callback(parts.store.close)
        async with trio.open_nursery() as nursery:
            await nursery.start(parts.driver.run)
            nursery.start_soon(_cancel_when_refused, parts.driver, nursery.cancel_scope)
            nursery.start_soon(keep_memory_ready, parts.prefaulted)
            nursery.start_soon(parts.closing.keep_closing)
            if disk is not None:
                tell_of_disk(disk, parts.driver)
                nursery.start_soon(disk.store.keep_removing)
            await _open_doors(parts, nursery)
            nursery.start_soon(keep_joining, parts.driver, partial(_find_others, parts, directory))
            node = Node(config, ports.addresses, parts.driver)
            try:
                yield node
            finally:
                with trio.CancelScope(shield=True):
                    await node.leave()
                    async with trio.open_nursery() as closing:
                        closing.start_soon(parts.links.close_all, "this node leaves")
                        closing.start_soon(parts.control.close_all, "this node leaves")
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
    disk: DiskStore | None
    prefaulted: PrefaultedMemory
    closing: ClosingThread
    links: PeerLinks
    driver: Driver
    control: ControlDoor
    security: "_Security"


@dataclass(frozen=True, slots=True)
class _Security:
    """Whom this node believes, and whom it turns away."""

    prover: Prover
    dial_rules: DialRules
    guard: DoorGuard


async def _secure(config: NodeConfig, ports: "_Ports", generation: int, environ: Mapping[str, str]) -> _Security:
    configured = configured_key(config)
    key = configured or user_key(user_folder(environ, config.cluster), config.cluster)
    me = Who(config.lmcache_instance_id, generation, (PROTOCOL_VERSION,))
    tokens = None
    if configured is not None:
        tokens = AccessTokens(full=key.token(Purpose.FULL_ACCESS), read_only=key.token(Purpose.READ_ONLY_ACCESS))
    hosts = (config.bind_host, config.advertise_host)
    names = {*hosts, *(address.host for address in ports.shared.addresses)}
    networks = config.allowed_peer_networks
    return _Security(
        Prover(key.subkey(Purpose.PEER_PROOF), config.cluster, me, door=PEER_PATH),
        DialRules(await networks_of(hosts) if networks is None else networks),
        DoorGuard(ports.numbers, frozenset(name for name in names if not is_loopback(name)), tokens),
    )


def _assemble(
    config: NodeConfig, place: Place, ports: "_Ports", generation: int, security: _Security, disk: OpenedDisk | None
) -> _Parts:
    host_id = BOOT_ID.read_text(encoding="ascii").strip()
    machine_config = MachineConfig(
        instance=config.lmcache_instance_id,
        generation=generation,
        cluster=config.cluster,
        ws=ports.addresses.ws,
        http=ports.addresses.http,
        transfer=ports.addresses.transfer,
        handoff=HandoffAddress(host_id, str(place.lane_socket)) if config.same_host_handoff else None,
        zone=config.zone,
        chunk_size=config.chunk_size,
        cpu_limit_nbytes=config.cpu_limit_nbytes,
        descriptor_limit=raise_descriptor_limit(),
        move_deadline_s=config.move_deadline_s,
        lease_s=config.lease_s,
        leave_s=config.leave_s,
        peer_fetch=config.peer_fetch,
        wall_offset_s=time.time() - trio.current_time(),
        disk_limit_nbytes=config.disk_limit_nbytes,
        timers_of=config.gossip.timers_of,
    )
    # Tickets come from this generator: a seeded one would give itself away in the ids of 312 events.
    machine = Machine(machine_config, secrets.SystemRandom(), trio.current_time())
    prefaulted, closing = PrefaultedMemory(config.prefaulted_limit_nbytes), ClosingThread()
    store, links = CpuStore(prefaulted, closing.close_soon), PeerLinks(security.prover, security.dial_rules)
    tcp = TcpFetcher(store, security.dial_rules, config.stream_count)
    lanes = RouteFetcher(handoff=HandoffFetcher(store, host_id), tcp=tcp)
    memories, fetcher = locations(store, disk, lanes)
    driver = Driver(machine, memories=memories, links=links, fetcher=fetcher)
    return _Parts(
        config=config,
        place=place,
        ports=ports,
        store=store,
        disk=None if disk is None else disk.store,
        prefaulted=prefaulted,
        closing=closing,
        links=links,
        driver=driver,
        control=ControlDoor(driver, security.guard),
        security=security,
    )


async def _open_doors(parts: _Parts, nursery: trio.Nursery) -> None:
    config, place, ports, driver = parts.config, parts.place, parts.ports, parts.driver
    grants, limit = driver.machine.lane_grant, config.transfer_rate_limit
    if config.same_host_handoff:
        handoff_listener = trio.SocketListener(open_unix_listener(place.lane_socket))
        await nursery.start(partial(serve_handoffs, disk=parts.disk), handoff_listener, grants, parts.store)
    tcp_listener = trio.SocketListener(trio.socket.from_stdlib_socket(ports.transfer))
    rate = None if limit is None else RateLimit(limit * MIB)
    await nursery.start(partial(serve_tcp, disk=parts.disk), tcp_listener, grants, parts.store, rate)
    engine_door = EngineDoor(driver, parts.store, chunk_size=config.chunk_size, cache_epoch=str(config.cache_epoch))
    await nursery.start(engine_door.serve, open_unix_listener(place.engine_socket))
    routes: dict[str, WebsocketHandler] = {
        PEER_PATH: partial(parts.links.accept, report=driver.handle),
        CONTROL_PATH: parts.control.accept,
    }

    async def serve_ws(listener: socket.socket, *, task_status: trio.TaskStatus[None]) -> None:
        wrapped = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        async with trio.open_nursery() as served:
            await served.start(serve_websockets, wrapped, routes, parts.security.guard)
            task_status.started()

    application = guarded_app(driver, parts.security.guard)
    await nursery.start(serve_ws, ports.ws)
    await nursery.start(serve_http, application, ports.http)
    await nursery.start(ports.shared.pass_on, open_unix_listener(place.shared_socket))
    shared_doors = {HTTP_KEY: partial(serve_http, application), RENDEZVOUS_KEY: serve_ws}
    await nursery.start(ports.shared.serve, shared_doors, partial(_show_card, parts))
    _show_card(parts)


# --- finding others -------------------------------------------------------------------------------------------------------


def _show_card(parts: _Parts) -> None:
    """Let the other nodes of this host find this one, as it is now."""
    if parts.config.enable_controller:
        addresses, shared = parts.ports.addresses, parts.ports.shared
        card = NodeCard(
            instance=parts.config.lmcache_instance_id,
            generation=parts.driver.machine.config.generation,
            pid=os.getpid(),
            ws=str(addresses.ws),
            http=addresses.http,
            transfer=str(addresses.transfer),
            shared=_url(shared.held(HTTP_KEY)),
            rendezvous=None if (held := shared.held(RENDEZVOUS_KEY)) is None else str(held),
        )
        publish(parts.place, card)


async def _find_others(parts: _Parts, directory: Path) -> list[Address]:
    """Whom to dial: this host's other nodes, the contacts, and who may be behind `controller_url`, unless that is here."""
    config = parts.config
    found = []
    for sibling in living_cards(directory, config.cluster) if config.enable_controller else ():
        if sibling.instance == config.lmcache_instance_id:
            continue
        try:
            found.append(parse_address(sibling.ws))
        except ValueError as error:
            _log.warning("a node of this host shows no address", instance=sibling.instance, reason=str(error))
    contacts = list(config.contacts)
    if config.controller_url is not None and parts.ports.shared.held(RENDEZVOUS_KEY) is None:
        contacts.append(config.controller_url)
    found += await dialable(contacts)
    parts.security.dial_rules.contacts_are(found)
    return found


def _sibling_sockets(place: Place, directory: Path) -> list[Path]:
    """Where the other nodes of this host and cluster pass the shared ports on."""
    siblings = living_places(directory, place.folder.parent.name)
    return [sibling.shared_socket for sibling in siblings if sibling.instance != place.instance]


# --- ports ----------------------------------------------------------------------------------------------------------------

HTTP_KEY, RENDEZVOUS_KEY = "controller_http_url", "controller_url"
"""Keys of the shared ports: the compatible HTTP port, and the websocket door that whole clusters meet at."""


@dataclass(frozen=True, slots=True)
class _Ports:
    """A node's TCP sockets, and what they are called."""

    ws: socket.socket
    http: socket.socket
    transfer: socket.socket
    shared: SharedPorts
    addresses: NodeAddresses

    @property
    def numbers(self) -> frozenset[int]:
        """Ports of the doors that a browser might knock on."""
        own = {port.getsockname()[1] for port in (self.ws, self.http)}
        return frozenset(own | {address.port for address in self.shared.addresses})


async def _open_ports(config: NodeConfig, stack: ExitStack, siblings: Callable[[], list[Path]]) -> _Ports:
    ws = stack.enter_context(listen_on(config.bind_host, config.lmcache_worker_port, key="lmcache_worker_port"))
    http = stack.enter_context(listen_on(config.bind_host, config.http_port or 0, key="http_port"))
    wanted = config.distributed_url
    transfer_host, transfer_port = (config.bind_host, 0) if wanted is None else (wanted.host, wanted.port)
    transfer = stack.enter_context(listen_on(transfer_host, transfer_port, key="distributed_url"))
    shared = stack.enter_context(SharedPorts(await _shared_addresses(config), siblings))
    for key, problem in (await shared.acquire()).items():
        _log.warning("this node goes on without a port that nodes of one host share", key=key, reason=problem)
    addresses = NodeAddresses(
        ws=address_of(ws, config.advertise_host),
        http=f"http://{address_of(http, config.advertise_host)}",
        transfer=address_of(transfer, transfer_host if wanted else config.advertise_host),
        shared=_url(shared.held(HTTP_KEY)),
    )
    return _Ports(ws=ws, http=http, transfer=transfer, shared=shared, addresses=addresses)


async def _shared_addresses(config: NodeConfig) -> dict[str, Address]:
    """The shared ports that this node has a part in; a rendezvous on another host is a contact."""
    if not config.enable_controller:
        return {}
    shared = {HTTP_KEY: config.controller_http_url}
    if (rendezvous := config.controller_url) is not None and any(map(is_of_this_host, await resolve(rendezvous))):
        shared[RENDEZVOUS_KEY] = rendezvous
    return shared


def _url(address: Address | None) -> str | None:
    return None if address is None else f"http://{address}"

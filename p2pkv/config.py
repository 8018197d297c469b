"""What an instance is told at its start: its yaml file, and the environment variables that override it.

LMCache's keys are all accepted. Those that have no meaning here give a warning; those that this version doesn't have yet, and
keys that nobody knows, are refused together with every wrong value, in one `ConfigError` that lists all of them.
"""

import os
import re
from collections.abc import Hashable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo

from p2pkv.config_layers import Layers, items, mapping, number, read_yaml, variables
from p2pkv.core.ids import Address, is_instance_id
from p2pkv.errors import ConfigError
from p2pkv.gossip_config import GossipConfig
from p2pkv.lmcache_keys import LMCACHE_KEYS

GIB = 2**30
KEY_MIN_NBYTES = 32
"""Of a cluster key: as many as the subkeys that are derived from it have."""
KEY_MAX_NBYTES = 4096
"""Any secret that people make is shorter; a longer file is the wrong one."""
STREAMS_MAX = 16
"""All the lanes that an instance runs at the same time."""


def is_address(host: str) -> bool:
    """Whether `host` is an IP address and no name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether `host` can only be this machine. Names other than `localhost` are not resolved, and are not."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def parse_address(text: str) -> Address:
    """`host:port` as an address; an IPv6 host stands in brackets, `http://` may stand before it.

    Raises:
        ValueError: It isn't that; the text says what is wrong.
    """
    host, separator, port = text.removeprefix("http://").rstrip("/").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or not port.isascii() or not 1 <= int(port) <= 65535:
        raise ValueError(f"must be host:port with a port from 1 to 65535, not {text!r}")
    return Address(host=host, port=int(port))


def _address(value: object) -> Address:
    return value if isinstance(value, Address) else parse_address(str(value))


def _name(value: str) -> str:
    if not is_instance_id(value):
        raise ValueError(f"must be 1 to 64 letters, digits, '.', '_' or '-', and not only dots, not {value!r}")
    return value


def _secret(value: object) -> object:
    """A key that a person wrote; what is wrong with it is told without it."""
    if isinstance(value, SecretStr):
        return value
    if not isinstance(value, str) or not KEY_MIN_NBYTES <= len(value.encode()) <= KEY_MAX_NBYTES:
        raise ValueError(f"must be a text of {KEY_MIN_NBYTES} to {KEY_MAX_NBYTES} bytes")
    return SecretStr(value)


def _one_key(value: Path | None, info: ValidationInfo) -> Path | None:
    if value is not None and info.data.get("cluster_key") is not None:
        raise ValueError("give either it or cluster_key")
    return value


def _network(value: object) -> IPv4Network | IPv6Network:
    try:
        return ip_network(str(value))
    except ValueError as error:
        raise ValueError(f"must be a network, as 10.0.0.0/24: {error}") from error


def _host(value: str, info: ValidationInfo) -> str:
    """A host of this node or of another; one beyond loopback only where the traffic's safety has been decided on.

    A key that was given and is wrong isn't in `info.data`; it has a problem of its own.
    """
    if not is_address(value) and not _HOST_NAME.fullmatch(value):
        raise ValueError(f"must be a host name or an IP address, not {value!r}")
    if is_loopback(value):
        return value
    settings = []
    if info.data.get("cluster_key", "") is None and info.data.get("cluster_key_file", "") is None:
        settings.append(f"cluster_key_file: a file of {KEY_MIN_NBYTES} bytes or more, the same on every node, mode 0600")
    if not info.data.get("insecure_network", True):
        settings.append("insecure_network: true, as nothing is encrypted: this version has no TLS yet")
    if settings:
        raise ValueError(f"{value} is beyond loopback, which needs {'; and '.join(settings)}")
    return value


def _streams(value: object) -> object:
    if value == "auto":
        return value
    if str(value) not in map(str, range(1, STREAMS_MAX + 1)):  # a variable of the environment is a text
        raise ValueError(f"must be auto, or a number from 1 to {STREAMS_MAX}, not {value!r}")
    return int(str(value))


def _host_of(value: Address, info: ValidationInfo) -> Address:
    _host(value.host, info)
    return value


def _reachable(value: str, info: ValidationInfo) -> str:
    """A host of this node as others are told it; where this node is beyond loopback, it must be so too."""
    is_loopback_node = is_loopback(info.data.get("bind_host", value))
    if (is_address(value) and ip_address(value).is_unspecified) or (is_loopback(value) and not is_loopback_node):
        raise ValueError(f"must be the address at which other nodes reach this one; {value} is everyone's own")
    return value


def _reachable_at(value: Address, info: ValidationInfo) -> Address:
    _reachable(value.host, info)
    return value


def _not_yet(*known: object) -> AfterValidator:
    """Refuses every value but these: the key is known, what other values ask for is to come."""

    def check(value: object) -> object:
        if value not in known:
            raise ValueError("this version doesn't have it yet; leave it out")
        return value

    return AfterValidator(check)


def _folder(value: object) -> Path | None:
    """Where chunks are kept on disk, as LMCache writes it: `file:///path/`; None when nowhere."""
    if value is None or value is False or isinstance(value, Path):
        return value or None
    text = str(value)
    if not text.startswith("file:///"):
        raise ValueError(f"must be file:///path of a directory, not {text!r}")
    return Path(text.removeprefix("file://"))


def _limited(value: float, info: ValidationInfo) -> float:
    if not value and info.data.get("local_disk") is not None:
        raise ValueError("must be above 0, as local_disk has a limit")
    return value


_NO_INSTANCE = {"P2PKV_LMCACHE_INSTANCE_ID": "client", "P2PKV_LMCACHE_WORKER_PORT": "1"}
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")

Name = Annotated[str, AfterValidator(_name)]
Host = Annotated[str, AfterValidator(_host)]
HostAddress = Annotated[Address, BeforeValidator(_address), AfterValidator(_host_of)]
Secret = Annotated[SecretStr, BeforeValidator(_secret)]
Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
Port = Annotated[int, BeforeValidator(number), Field(ge=1, le=65535)]
Seconds = Annotated[float, BeforeValidator(number), Field(gt=0, le=86400, allow_inf_nan=False)]
Gibibytes = Annotated[float, BeforeValidator(number), Field(gt=0, le=2**20, allow_inf_nan=False)]


class NodeConfig(BaseModel):
    """One instance's configuration; attributes are named as the yaml's keys.

    Attributes:
        cluster_key: Who has it belongs to the cluster; the bytes of the text.
        cluster_key_file: Where it stands instead.
        insecure_network: The operator knows that traffic beyond loopback isn't encrypted.
        lmcache_instance_id: The instance's name, unique in the cluster.
        chunk_size: Tokens in a full chunk; the same in all instances that exchange chunks.
        local_cpu: False: it has no LocalCPUBackend, so no engine can attach.
        max_local_cpu_size: Hard limit of LocalCPUBackend in GiB, for all of the instance's workers together.
        max_prefaulted_size: Limit in GiB, beside `max_local_cpu_size`, of memory that is faulted in ahead for what comes over
            TCP; 0 for none.
        local_disk: Directory of LocalDiskBackend, `file:///path`, this instance's alone; None to have no such location.
        max_local_disk_size: Hard limit of LocalDiskBackend in GiB.
        cache_policy: Which chunks go first when a location is full.
        cache_epoch: Raise it when weights change under the same name: chunks of different epochs never mix.
        enable_controller: False: no rendezvous and no compatible HTTP port.
        controller_url: The rendezvous: a contact, or an address of this host that the nodes here serve together.
        controller_http_url: The compatible HTTP port, which the nodes of this host serve together.
        lmcache_worker_port: Port of the websocket door; 0 for any free one.
            distributed_url: The transfer address; None for `bind_host` and any free port.
        http_port: Port of this node's own HTTP door; None for any free one.
        cluster: Nodes of different clusters never join.
        contacts: Websocket doors of nodes to join through.
        bind_host: Where the doors listen.
        advertise_host: What others are told to dial, `bind_host` unless given.
        allowed_peer_networks: Where members may be dialed; None for the networks that this node's own addresses lie in.
            Contacts always may.
        same_host_handoff: False: never pass descriptors, always send bytes over TCP.
        transfer_streams: TCP streams among which the chunks that one move fetches are dealt, 1 to 16; `auto` for half as many
            as the processors it may use, at least 1 and at most 4.
        transfer_rate_limit: MiB/s that all lanes of this node together may send; None for no limit.
        leave_s: How long a leaving node may take to end its moves, seconds.
        move_deadline_s: A move ends by then, seconds from its start.
        lease_s: A lease that isn't renewed ends by then, seconds.
        peer_fetch: True: what an engine looks up and isn't held here is fetched from a peer that holds it.
        zone: Where the instance stands, in the operator's words.
        gossip: How membership's timers differ from those of nodes near each other.
        warnings: No key: sentences about keys that were given and have no effect, to be logged at the start.

    The others are known and refused until this version has what they ask for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    cluster_key: Secret | None = None  # these three come first: the hosts below depend on them
    cluster_key_file: Annotated[Path | None, AfterValidator(_one_key)] = None
    insecure_network: bool = False
    lmcache_instance_id: Name
    chunk_size: Annotated[int, BeforeValidator(number), Field(ge=1, le=65536)] = 256
    local_cpu: bool = True
    max_local_cpu_size: Gibibytes = 5.0
    max_prefaulted_size: Annotated[float, BeforeValidator(number), Field(ge=0, le=2**20, allow_inf_nan=False)] = 0.25
    local_disk: Annotated[Path | None, BeforeValidator(_folder)] = None
    max_local_disk_size: Annotated[
        float, BeforeValidator(number), Field(ge=0, le=2**20, allow_inf_nan=False), AfterValidator(_limited)
    ] = Field(default=0.0, validate_default=True)
    cache_policy: Literal["LRU"] = "LRU"
    cache_epoch: Annotated[int, BeforeValidator(number), Field(ge=0, lt=2**63)] = 0
    enable_controller: bool = True
    controller_url: HostAddress | None = None
    controller_http_url: HostAddress = Address("localhost", 9000)
    lmcache_worker_port: Annotated[int, BeforeValidator(number), Field(ge=0, le=65535)]
    http_port: Port | None = None
    cluster: Name = "p2pkv"
    contacts: Annotated[tuple[HostAddress, ...], BeforeValidator(items), Field(max_length=256)] = ()
    bind_host: Host = "127.0.0.1"
    advertise_host: Annotated[Host, AfterValidator(_reachable)] = Field(
        default_factory=lambda values: values["bind_host"], validate_default=True
    )
    distributed_url: Annotated[HostAddress, AfterValidator(_reachable_at)] | None = None
    tls_cert: Annotated[object, _not_yet(None)] = None
    tls_key: Annotated[object, _not_yet(None)] = None
    tls_ca: Annotated[object, _not_yet(None)] = None
    same_host_handoff: bool = True
    transfer_streams: Annotated[Literal["auto"] | int, BeforeValidator(_streams)] = "auto"
    transfer_rate_limit: Annotated[float, BeforeValidator(number), Field(ge=1, allow_inf_nan=False)] | None = None
    leave_s: Seconds = 2.0
    allowed_peer_networks: Annotated[tuple[Network, ...] | None, BeforeValidator(items), Field(max_length=256)] = None
    move_deadline_s: Seconds = 600.0
    lease_s: Seconds = 30.0
    peer_fetch: bool = False
    zone: Annotated[str, Field(max_length=512)] = ""
    gossip: Annotated[GossipConfig, BeforeValidator(mapping)] = GossipConfig()
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_yaml(cls, path: str | Path, environ: Mapping[str, str] = os.environ) -> Self:
        """Read an instance's yaml file, overridden by `environ`.

        Raises:
            ConfigError: The file can't be read, or it and `environ` have problems; all are listed.
        """
        return cls._from_layers(read_yaml(Path(path)), environ, source=str(path))

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read the file that `P2PKV_CONFIG_FILE` or `LMCACHE_CONFIG_FILE` names, if any, overridden by `environ`.

        Raises:
            ConfigError: As `from_yaml`.
        """
        path = environ.get("P2PKV_CONFIG_FILE") or environ.get("LMCACHE_CONFIG_FILE")
        return cls.from_yaml(path, environ) if path else cls._from_layers({}, environ, source="the environment")

    @classmethod
    def of_client(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """As `from_environ`, for who is no instance: a name and a port of its own aren't asked for, and mean nothing.

        Raises:
            ConfigError: As `from_yaml`.
        """
        return cls.from_environ({**_NO_INSTANCE, **environ})

    @classmethod
    def of_controller(cls, *, host: str, port: int, monitor_port: int, environ: Mapping[str, str] = os.environ) -> Self:
        """What `p2pkv controller` is: a node without storage at LMCache's controller's ports. `environ` says the rest.

        Raises:
            ConfigError: As `from_yaml`.
        """
        return cls._from_layers(
            {"lmcache_worker_port": 0},
            environ,
            source="the command line",
            lmcache_instance_id=f"controller-{port}",
            local_cpu=False,
            enable_controller=True,
            bind_host=host,
            controller_http_url=Address(host, port),
            controller_url=Address(host, monitor_port),
        )

    @classmethod
    def _from_layers(cls, values: Mapping[Hashable, object], environ: Mapping[str, str], source: str, **asked: object) -> Self:
        layers = Layers(frozenset(cls.model_fields) - {"warnings"})
        layers.add({str(key): value for key, value in values.items()}, prefix="")
        layers.add(variables(environ, "LMCACHE_", LMCACHE_KEYS), prefix="LMCACHE_")
        layers.add(variables(environ, "P2PKV_", None), prefix="P2PKV_")
        layers.add(asked, prefix="")
        try:
            config = cls.model_validate({**layers.values, "warnings": tuple(layers.warnings)})
        except ValidationError as error:
            layers.add_problems(error)
        if layers.problems:
            count = len(layers.problems)
            title = f"{source} has {count} problems:" if count > 1 else f"{source} has a problem:"
            raise ConfigError("\n  ".join([title, *layers.problems]))
        return config

    @property
    def cpu_limit_nbytes(self) -> int:
        """Limit of LocalCPUBackend, in bytes; 0 when there is none."""
        return int(self.max_local_cpu_size * GIB) if self.local_cpu else 0

    @property
    def disk_limit_nbytes(self) -> int:
        """Limit of LocalDiskBackend, in bytes; 0 when there is none."""
        return 0 if self.local_disk is None else int(self.max_local_disk_size * GIB)

    @property
    def stream_count(self) -> int:
        """TCP streams of one fetch."""
        if self.transfer_streams == "auto":
            return min(max(len(os.sched_getaffinity(0)) // 2, 1), 4)
        return self.transfer_streams

    @property
    def prefaulted_limit_nbytes(self) -> int:
        """Limit of the memory that is faulted in ahead, in bytes."""
        return int(self.max_prefaulted_size * GIB) if self.local_cpu else 0

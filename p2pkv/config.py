"""What an instance is told at its start: its yaml file, and the environment variables that override it.

LMCache's keys are all accepted. Those that have no meaning here give a warning; those that this version doesn't have yet, and
keys that nobody knows, are refused together with every wrong value, in one `ConfigError` that lists all of them.
"""

import os
from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from p2pkv.core.ids import Address, is_instance_id
from p2pkv.errors import ConfigError

GIB = 2**30

_SHARED_KEYS = frozenset(
    {
        "chunk_size",
        "local_cpu",
        "max_local_cpu_size",
        "local_disk",
        "max_local_disk_size",
        "cache_policy",
        "enable_controller",
        "lmcache_instance_id",
        "controller_url",
        "lmcache_worker_port",
        "distributed_url",
    }
)
"""Keys that mean the same in LMCache and here."""

_ALIASES = {"lmcache_worker_ports": "lmcache_worker_port", "controller_pull_url": "controller_url"}
"""LMCache's newer names of keys."""

_MEANINGLESS_KEYS = {
    key: reason
    for reason, keys in {
        "there is no remote store": "remote_url remote_serde remote_storage_plugins audit_actual_remote_url",
        "there is no central controller to answer to": "controller_reply_url",
        "nodes find and watch each other by themselves": "enable_p2p p2p_host p2p_init_ports p2p_lookup_ports mp_host mp_port"
        " lmcache_worker_ids lmcache_worker_heartbeat_delay_time lmcache_worker_heartbeat_time transfer_channel",
        "moves replace prefill-decode channels": "enable_pd enable_xpyd pd_role pd_buffer_size pd_buffer_device pd_peer_host"
        " pd_peer_init_port pd_peer_alloc_port pd_peer_query_port pd_proxy_host pd_proxy_port pd_allocation_timeout_sec"
        " pd_shutdown_timeout_sec pd_condition_poll_interval_sec pd_max_prefill_len pd_backend_mode"
        " pd_skip_proxy_notification pd_bidirectional enable_nixl nixl_role nixl_peer_host nixl_peer_port nixl_receiver_host"
        " nixl_receiver_port nixl_peer_init_port nixl_peer_alloc_port nixl_proxy_host nixl_proxy_port nixl_backends"
        " nixl_buffer_size nixl_buffer_device nixl_enable_gc",
        "chunks are kept in host memory": "gds_path gds_path_sharding gds_buffer_size gds_backend use_gds cufile_buffer_size"
        " weka_path maru_path maru_pool_size local_disk_path_sharding store_location retrieve_locations storage_plugins"
        " external_backends",
        "its memory is made chunk by chunk": "local_cpu_use_hugepages reserve_local_cpu_size numa_mode pin_timeout_sec"
        " pin_check_interval_sec enable_lazy_memory_allocator lazy_memory_initial_ratio lazy_memory_expand_trigger_ratio"
        " lazy_memory_step_ratio lazy_memory_safe_size cost_aware_half_life_seconds cost_aware_ewma_alpha",
        "chunk keys have one digest, the same everywhere": "pre_caching_hash_algorithm",
        "the partly filled last chunk of a prompt is always stored": "save_unfull_chunk",
        "the engine's adapter decides what it stores and loads": "use_layerwise save_decode_cache enable_async_loading"
        " priority_limit min_retrieve_tokens hit_miss_ratio blocking_timeout_secs use_gpu_connector_v3"
        " enable_hidden_state_cache max_hidden_state_cpu_size hidden_state_layers hidden_states_retrieve_mode",
        "prefixes aren't blended": "enable_blending blend_recompute_ratios blend_thresholds blend_check_layers"
        " blend_min_tokens blend_special_str",
        "every node answers lookups itself": "external_lookup_client lookup_timeout_ms lookup_server_worker_ids"
        " enable_scheduler_bypass_lookup",
        "every node has its own HTTP door": "internal_api_server_enabled internal_api_server_host"
        " internal_api_server_port_start internal_api_server_include_index_list internal_api_server_socket_path_prefix",
        "p2pkv has nothing like it": "extra_config py_enable_gc runtime_plugin_locations plugin_locations"
        " script_allowed_imports enable_chunk_statistics chunk_statistics_auto_start_statistics"
        " chunk_statistics_auto_exit_timeout_hours chunk_statistics_auto_exit_target_unique_chunks"
        " chunk_statistics_strategy enable_kv_events remote_config_url app_id",
    }.items()
    for key in keys.split()
}
"""LMCache's other keys, and why they have no meaning here."""

_OTHER_VARIABLES = frozenset({"P2PKV_CONFIG_FILE", "P2PKV_RUNTIME_DIR"})


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


def _items(value: object) -> object:
    """A list as an environment variable has it: `a, b` or `[a, b]`."""
    return tuple(part.strip() for part in value.strip("[] ").split(",")) if isinstance(value, str) else value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")
    return value


def _name(value: str) -> str:
    if not is_instance_id(value):
        raise ValueError(f"must be 1 to 64 letters, digits, '.', '_' or '-', and not only dots, not {value!r}")
    return value


def _local_host(value: str) -> str:
    if not is_loopback(value):
        raise ValueError(f"this version serves loopback only and can't use {value!r}; use 127.0.0.1 or localhost")
    return value


def _local_address(value: Address) -> Address:
    _local_host(value.host)
    return value


def _not_yet(default: object) -> AfterValidator:
    """Refuses every value but `default`: the key is known, what it asks for is to come."""

    def check(value: object) -> object:
        if value != default:
            raise ValueError("this version doesn't have it yet; leave it out")
        return value

    return AfterValidator(check)


Name = Annotated[str, AfterValidator(_name)]
Host = Annotated[str, AfterValidator(_local_host)]
LocalAddress = Annotated[Address, BeforeValidator(_address), AfterValidator(_local_address)]
Port = Annotated[int, BeforeValidator(_number), Field(ge=1, le=65535)]
Seconds = Annotated[float, BeforeValidator(_number), Field(gt=0, le=86400, allow_inf_nan=False)]
Gibibytes = Annotated[float, BeforeValidator(_number), Field(gt=0, le=2**20, allow_inf_nan=False)]


class NodeConfig(BaseModel):
    """One instance's configuration; attributes are named as the yaml's keys.

    Attributes:
        lmcache_instance_id: The instance's name, unique in the cluster.
        chunk_size: Tokens in a full chunk; the same in all instances that exchange chunks.
        local_cpu: Always true: LocalCPUBackend is the one location of this version.
        max_local_cpu_size: Hard limit of LocalCPUBackend in GiB, for all of the instance's workers together.
        max_local_disk_size: LMCache's limit of a disk location in GiB; without effect, as there is none.
        cache_policy: Which chunks go first when a location is full.
        cache_epoch: Raise it when weights change under the same name: chunks of different epochs never mix.
        enable_controller: False: no rendezvous and no compatible HTTP port.
        controller_url: Where LMCache's controller would be; without effect as long as nodes don't serve it together.
        controller_http_url: The compatible HTTP port, which the first node of the host that can bind it serves.
        lmcache_worker_port: Port of the websocket door.
        distributed_url: The transfer address; None for `bind_host` and any free port.
        http_port: Port of this node's own HTTP door; None for any free one.
        cluster: Nodes of different clusters never join.
        contacts: Websocket doors of nodes to join through.
        bind_host: Where the doors listen.
        advertise_host: What others are told to dial, `bind_host` unless given.
        leave_s: How long a leaving node may take to end its moves, seconds.
        move_deadline_s: A move ends by then, seconds from its start.
        lease_s: A lease that isn't renewed ends by then, seconds.
        zone: Where the instance stands, in the operator's words.
        warnings: No key: sentences about keys that were given and have no effect, to be logged at the start.

    The others are known and refused until this version has what they ask for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lmcache_instance_id: Name
    chunk_size: Annotated[int, BeforeValidator(_number), Field(ge=1, le=65536)] = 256
    local_cpu: Annotated[bool, _not_yet(True)] = True
    max_local_cpu_size: Gibibytes = 5.0
    local_disk: Annotated[object, _not_yet(None)] = None
    max_local_disk_size: Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)] = 0.0
    cache_policy: Literal["LRU"] = "LRU"
    cache_epoch: Annotated[int, BeforeValidator(_number), Field(ge=0, lt=2**63)] = 0
    enable_controller: bool = True
    controller_url: LocalAddress | None = None
    controller_http_url: LocalAddress = Address("localhost", 9000)
    lmcache_worker_port: Port
    distributed_url: LocalAddress | None = None
    http_port: Port | None = None
    cluster: Name = "p2pkv"
    contacts: Annotated[tuple[LocalAddress, ...], BeforeValidator(_items), Field(max_length=256)] = ()
    bind_host: Host = "127.0.0.1"
    advertise_host: Host = Field(default_factory=lambda values: values["bind_host"])
    cluster_key: Annotated[object, _not_yet(None)] = None
    cluster_key_file: Annotated[object, _not_yet(None)] = None
    tls_cert: Annotated[object, _not_yet(None)] = None
    tls_key: Annotated[object, _not_yet(None)] = None
    tls_ca: Annotated[object, _not_yet(None)] = None
    same_host_handoff: Annotated[bool, _not_yet(True)] = True
    transfer_streams: Annotated[object, _not_yet("auto")] = "auto"
    transfer_rate_limit: Annotated[object, _not_yet(None)] = None
    leave_s: Seconds = 2.0
    allowed_peer_networks: Annotated[object, _not_yet(None)] = None
    insecure_network: Annotated[bool, _not_yet(False)] = False
    move_deadline_s: Seconds = 600.0
    lease_s: Seconds = 30.0
    peer_fetch: Annotated[bool, _not_yet(False)] = False
    zone: Annotated[str, Field(max_length=512)] = ""
    gossip: Annotated[object, _not_yet(None)] = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_yaml(cls, path: str | Path, environ: Mapping[str, str] = os.environ) -> Self:
        """Read an instance's yaml file, overridden by `environ`.

        Raises:
            ConfigError: The file can't be read, or it and `environ` have problems; all are listed.
        """
        return cls._from_layers(_read_yaml(Path(path)), environ, source=str(path))

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read the file that `P2PKV_CONFIG_FILE` or `LMCACHE_CONFIG_FILE` names, if any, overridden by `environ`.

        Raises:
            ConfigError: As `from_yaml`.
        """
        path = environ.get("P2PKV_CONFIG_FILE") or environ.get("LMCACHE_CONFIG_FILE")
        return cls.from_yaml(path, environ) if path else cls._from_layers({}, environ, source="the environment")

    @classmethod
    def _from_layers(cls, values: Mapping[Hashable, object], environ: Mapping[str, str], source: str) -> Self:
        layers = _Layers(frozenset(cls.model_fields) - {"warnings"})
        layers.add({str(key): value for key, value in values.items()}, prefix="")
        layers.add(_variables(environ, "LMCACHE_", _LMCACHE_KEYS), prefix="LMCACHE_")
        layers.add(_variables(environ, "P2PKV_", None), prefix="P2PKV_")
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
    def ws_address(self) -> Address:
        """Where other nodes reach this node's websocket door."""
        return Address(host=self.advertise_host, port=self.lmcache_worker_port)

    @property
    def cpu_limit_nbytes(self) -> int:
        """Limit of LocalCPUBackend, in bytes."""
        return int(self.max_local_cpu_size * GIB)


_LMCACHE_KEYS = _SHARED_KEYS | set(_ALIASES) | set(_MEANINGLESS_KEYS)


class _Layers:
    """Values put over each other, the later the stronger, and what is wrong with their keys."""

    def __init__(self, fields: frozenset[str]) -> None:
        self.values: dict[str, object] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._fields = fields
        self._origins: dict[str, str] = {}

    def add(self, layer: Mapping[str, object], prefix: str) -> None:
        """Put one layer on top; `prefix` makes a key the name that the user wrote. A null says "as by default"."""
        own: dict[str, str] = {}
        for key, value in layer.items():
            shown = prefix + key.upper() if prefix else key
            field = _ALIASES.get(key, key)
            if field in self._fields:
                meant = self._first_port(shown, value) if key == "lmcache_worker_ports" else value
                if field in own and self.values.get(field) != meant:
                    self.problems.append(f"{shown}: contradicts {own[field]}, which means the same")
                own[field] = shown
                self._put(field, meant, shown)
            elif key in _MEANINGLESS_KEYS:
                self.warnings.append(f"{shown} has no meaning here: {_MEANINGLESS_KEYS[key]}")
            else:
                near = get_close_matches(key.lower(), sorted(self._fields | _LMCACHE_KEYS), n=1)
                hint = f"; did you mean {prefix + near[0].upper() if prefix else near[0]}?" if near else ""
                self.problems.append(f"{shown}: unknown key{hint}")

    def add_problems(self, error: ValidationError) -> None:
        """Say each of pydantic's findings in a sentence that begins with the name that the user wrote."""
        for found in error.errors(include_url=False):
            if found["type"] == "default_factory_not_called":  # it depends on a field that has a problem of its own
                continue
            field, *place = found["loc"]
            name = "".join([self._origins.get(str(field), str(field)), *(f"[{part}]" for part in place)])
            if found["type"] == "missing":
                text = "is required"
            elif found["type"] == "value_error":
                text = str(found["ctx"]["error"])
            else:
                text = f"{found['msg'].removeprefix('Input ')}, not {_short(found['input'])}"
            self.problems.append(f"{name}: {text}")

    def _put(self, field: str, value: object, shown: str) -> None:
        if value is None:
            self.values.pop(field, None)
        else:
            self.values[field] = value
            self._origins[field] = shown

    def _first_port(self, shown: str, value: object) -> object:
        ports = _items(value)
        if not isinstance(ports, list | tuple) or not ports:
            return value
        if len(ports) > 1:
            self.warnings.append(f"{shown}: one websocket port serves all workers, {ports[0]} is used")
        return ports[0]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _variables(environ: Mapping[str, str], prefix: str, keys: frozenset[str] | None) -> dict[str, object]:
    """Values of the variables `PREFIX_KEY`, of `keys` or all, by key in lower case; an empty one counts as unset."""
    found = {name.removeprefix(prefix).lower(): environ[name] for name in sorted(environ) if name.startswith(prefix)}
    special = {name.removeprefix(prefix).lower() for name in _OTHER_VARIABLES}
    return {key: value for key, value in found.items() if value and key not in special and (keys is None or key in keys)}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:  # noqa: FBT001, FBT002
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Mapping[Hashable, object]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} isn't UTF-8 text: byte {error.start} is wrong") from error
    try:
        values = yaml.load(text, _UniqueKeyLoader)  # noqa: S506  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path} isn't valid YAML: {error.problem}{place}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} isn't valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} isn't valid YAML: it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, as `chunk_size: 256`")
    return values

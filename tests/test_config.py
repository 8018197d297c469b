"""The configuration: what is taken, what is refused, and that every problem is told at once."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.config import NodeConfig
from p2pkv.core.ids import Address
from p2pkv.core.timers import Timers, lan, local, wan
from p2pkv.errors import ConfigError
from p2pkv.gossip_config import GossipConfig

PAIR = Path(__file__).parent.parent / "topology" / "pair"
NEEDED = "lmcache_instance_id: a\nlmcache_worker_port: 8002\n"
Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an instance's yaml."""

    def write_file(content: str | bytes) -> Path:
        path = tmp_path / "instance.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def problems(path: Path, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        NodeConfig.from_yaml(path, environ or {})
    return str(caught.value)


@pytest.mark.parametrize(("number", "ws_port", "transfer_port"), [(1, 8002, 8004), (2, 8003, 8005)])
def test_the_seeds_files_need_no_change(number: int, ws_port: int, transfer_port: int) -> None:
    config = NodeConfig.from_yaml(PAIR / f"instance{number}.yaml", {})
    assert config.lmcache_instance_id == f"lmcache_instance_{number}"
    assert config.lmcache_worker_port == ws_port
    assert config.distributed_url == Address("localhost", transfer_port)
    assert config.controller_url == Address("localhost", 9001)
    assert config.controller_http_url == Address("localhost", 9000)
    assert config.cpu_limit_nbytes == 5 * 2**30
    assert config.warnings == ()


def test_every_problem_is_told_at_once_with_the_nearest_known_key(write: Write) -> None:
    text = problems(
        write("chunk_sise: 128\nmax_local_cpu_size: -1\nlmcache_worker_port: 99999\nlmcache_instance_id: 'a b'\nfoo_bar: 1\n")
    )
    assert "has 5 problems" in text
    assert "chunk_sise: unknown key; did you mean chunk_size?" in text
    assert "foo_bar: unknown key\n" in text
    assert "max_local_cpu_size: should be greater than 0, not -1" in text
    assert "lmcache_worker_port: should be less than or equal to 65535, not 99999" in text
    assert "lmcache_instance_id: must be 1 to 64 letters" in text


def test_what_is_missing_is_named(write: Write) -> None:
    text = problems(write("chunk_size: 16\n"))
    assert "lmcache_instance_id: is required" in text
    assert "lmcache_worker_port: is required" in text


@pytest.mark.parametrize("size", ["0", "65537", "true", "'x'", "1.5", "[1]"])
def test_chunk_sizes_out_of_range_or_of_another_type_are_refused(write: Write, size: str) -> None:
    assert "chunk_size: " in problems(write(f"{NEEDED}chunk_size: {size}\n"))


@pytest.mark.parametrize("limit", ["0", ".inf", ".nan", "false", "lots"])
def test_memory_limits_are_positive_finite_numbers(write: Write, limit: str) -> None:
    assert "max_local_cpu_size: " in problems(write(f"{NEEDED}max_local_cpu_size: {limit}\n"))


def test_a_fraction_of_a_gibibyte_is_a_limit(write: Write) -> None:
    assert NodeConfig.from_yaml(write(f"{NEEDED}max_local_cpu_size: 0.25\n"), {}).cpu_limit_nbytes == 2**28


@pytest.mark.parametrize("name", ["''", "'a/b'", "'..'", "'a~b'", f"'{'x' * 65}'", "'ä'", "5"])
def test_names_that_are_no_instance_ids_are_refused(write: Write, name: str) -> None:
    assert "lmcache_instance_id: " in problems(write(f"lmcache_instance_id: {name}\nlmcache_worker_port: 1\n"))


@pytest.mark.parametrize(
    "line",
    [
        "tls_cert: /c",
        "tls_key: /k",
        "tls_ca: /a",
    ],
)
def test_what_this_version_does_not_have_yet_is_refused_by_name(write: Write, line: str) -> None:
    assert f"{line.partition(':')[0]}: this version doesn't have it yet" in problems(write(f"{NEEDED}{line}\n"))


@pytest.mark.parametrize("limit", ["0.5", "-1", "0", ".inf", ".nan", "true", "fast"])
def test_a_rate_limit_is_at_least_a_mebibyte_a_second(write: Write, limit: str) -> None:
    assert "transfer_rate_limit: " in problems(write(f"{NEEDED}transfer_rate_limit: {limit}\n"))


def test_how_bytes_travel_can_be_chosen(write: Write) -> None:
    keys = "same_host_handoff: false\ntransfer_rate_limit: 100\ntransfer_streams: 1\n"
    config = NodeConfig.from_yaml(write(f"{NEEDED}{keys}"), {"P2PKV_TRANSFER_STREAMS": "3"})
    assert (config.same_host_handoff, config.transfer_rate_limit, config.stream_count) == (False, 100.0, 3)


@pytest.mark.parametrize(("processor_count", "streams"), [(1, 1), (2, 1), (6, 3), (64, 4)])
def test_streams_are_half_as_many_as_processors_and_at_most_4(
    write: Write, monkeypatch: pytest.MonkeyPatch, processor_count: int, streams: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processor_count)))
    assert NodeConfig.from_yaml(write(NEEDED), {}).stream_count == streams


@pytest.mark.parametrize("streams", ["0", "17", "2.5", "true", "many"])
def test_streams_are_a_few_or_auto(write: Write, streams: str) -> None:
    assert "transfer_streams: must be auto, or a number from 1 to 16, not " in problems(
        write(f"{NEEDED}transfer_streams: {streams}\n")
    )


def test_a_node_can_do_without_storage_and_on_any_free_port(write: Write) -> None:
    config = NodeConfig.from_yaml(write("lmcache_instance_id: a\nlmcache_worker_port: 0\nlocal_cpu: false\n"), {})
    assert (config.cpu_limit_nbytes, config.lmcache_worker_port) == (0, 0)


def test_a_controller_is_what_its_command_says_and_the_rest_what_variables_say() -> None:
    environ = {
        "P2PKV_CONTROLLER_HTTP_URL": "localhost:1",
        "P2PKV_LMCACHE_INSTANCE_ID": "other",
        "LMCACHE_CONFIG_FILE": "/missing",
        "P2PKV_CLUSTER": "mine",
        "P2PKV_LMCACHE_WORKER_PORT": "7",
    }
    config = NodeConfig.of_controller(host="localhost", port=9000, monitor_port=9001, environ=environ)
    assert config.lmcache_instance_id == "controller-9000"
    assert (config.controller_http_url, config.controller_url) == (Address("localhost", 9000), Address("localhost", 9001))
    assert (config.cpu_limit_nbytes, config.cluster, config.lmcache_worker_port) == (0, "mine", 7)


@pytest.mark.parametrize("url", ["localhost", "localhost:", ":80", "localhost:0", "localhost:65536", "localhost:x", "5"])
def test_what_is_no_address_is_refused(write: Write, url: str) -> None:
    assert "distributed_url: must be host:port" in problems(write(f"{NEEDED}distributed_url: '{url}'\n"))


def test_contacts_are_loopback_addresses_of_either_family(write: Write) -> None:
    config = NodeConfig.from_yaml(write(f"{NEEDED}contacts: ['localhost:1', '[::1]:2', '127.0.0.9:3']\n"), {})
    assert config.contacts == (Address("localhost", 1), Address("::1", 2), Address("127.0.0.9", 3))


def test_keys_of_lmcache_without_meaning_warn_once_each_and_say_why(write: Write) -> None:
    config = NodeConfig.from_yaml(write(f"{NEEDED}remote_url: lm://x:1\nsave_unfull_chunk: false\ngds_path: null\n"), {})
    assert len(config.warnings) == 3
    assert "remote_url has no meaning here: there is no remote store" in config.warnings
    assert all("has no meaning here: " in warning for warning in config.warnings)


def test_worker_ports_are_taken_as_a_list_too(write: Write) -> None:
    config = NodeConfig.from_yaml(write("lmcache_instance_id: a\nlmcache_worker_ports: [8002]\n"), {})
    assert config.lmcache_worker_port == 8002
    assert config.warnings == ()


def test_of_several_worker_ports_the_first_is_used_and_a_warning_says_so(write: Write) -> None:
    config = NodeConfig.from_yaml(write("lmcache_instance_id: a\nlmcache_worker_ports: [8002, 8003]\n"), {})
    assert config.lmcache_worker_port == 8002
    assert config.warnings == ("lmcache_worker_ports: one websocket port serves all workers, 8002 is used",)


def test_two_names_of_one_key_must_not_contradict_each_other(write: Write) -> None:
    text = problems(write(f"{NEEDED}lmcache_worker_ports: [8003]\n"))
    assert "lmcache_worker_ports: contradicts lmcache_worker_port" in text
    same = NodeConfig.from_yaml(write(f"{NEEDED}lmcache_worker_ports: [8002]\n"), {})
    assert same.lmcache_worker_port == 8002


def test_variables_override_the_file_and_ours_override_lmcaches(write: Write) -> None:
    environ = {
        "LMCACHE_CHUNK_SIZE": "16",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "1.5",
        "P2PKV_CHUNK_SIZE": "32",
        "P2PKV_ENABLE_CONTROLLER": "false",
        "P2PKV_CONTACTS": "localhost:1, localhost:2",
        "LMCACHE_LMCACHE_WORKER_PORTS": "[9,10]",
        "P2PKV_ZONE": "",
        "P2PKV_RUNTIME_DIR": "/x",
        "LMCACHE_LOG_LEVEL": "DEBUG",
        "LMCACHE_ZONE": "not LMCache's key",
    }
    config = NodeConfig.from_yaml(write(f"{NEEDED}zone: here\n"), environ)
    assert config.chunk_size == 32
    assert config.max_local_cpu_size == 1.5
    assert config.enable_controller is False
    assert config.contacts == (Address("localhost", 1), Address("localhost", 2))
    assert config.lmcache_worker_port == 9
    assert config.zone == "here"


def test_problems_in_variables_are_told_by_their_names(write: Write) -> None:
    text = problems(write(NEEDED), {"LMCACHE_CHUNK_SIZE": "many", "P2PKV_CHUNKSIZE": "1"})
    assert "LMCACHE_CHUNK_SIZE: should be a valid integer" in text
    assert "P2PKV_CHUNKSIZE: unknown key; did you mean P2PKV_CHUNK_SIZE?" in text


def test_a_variable_names_the_file(write: Write) -> None:
    path = write(NEEDED)
    assert NodeConfig.from_environ({"LMCACHE_CONFIG_FILE": str(path)}).lmcache_instance_id == "a"
    assert NodeConfig.from_environ({"P2PKV_CONFIG_FILE": str(path), "LMCACHE_CONFIG_FILE": "/no"}).chunk_size == 256


def test_variables_alone_are_enough() -> None:
    config = NodeConfig.from_environ({"P2PKV_LMCACHE_INSTANCE_ID": "5", "LMCACHE_LMCACHE_WORKER_PORT": "8002"})
    assert (config.lmcache_instance_id, config.lmcache_worker_port) == ("5", 8002)
    with pytest.raises(ConfigError, match="the environment has 2 problems"):
        NodeConfig.from_environ({})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must hold a mapping"),
        (b"- 1\n", "must hold a mapping"),
        (b"a: [\n", "isn't valid YAML"),
        (b"\xff\xfe", "isn't UTF-8"),
        (b"\x00", "isn't valid YAML"),
        (b"a: 1\nb: 2\na: 3\n", "the key a is there twice, line 3"),
        (b"a: 2026-13-45\n", "isn't valid YAML"),
        (b"? [1]\n: 2\n", "isn't valid YAML"),
        (b"a: !!python/name:os.system\n", "isn't valid YAML"),
        (b"[" * 5_000, "isn't valid YAML: it is nested too deeply"),
    ],
)
def test_files_that_are_no_yaml_mapping_are_refused_with_a_sentence(write: Write, content: bytes, reason: str) -> None:
    path = write(content)
    text = problems(path)
    assert text.startswith(str(path))
    assert reason in text


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "missing.yaml")
    assert "Is a directory" in problems(tmp_path)


def test_a_null_means_the_default(write: Write) -> None:
    config = NodeConfig.from_yaml(write(f"{NEEDED}chunk_size: null\nlocal_disk:\n"), {})
    assert config.chunk_size == 256


# --- anything -------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=9) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(NodeConfig.model_fields)) | st.text(max_size=20)


def take_or_refuse(content: bytes, environ: dict[str, str] | None = None) -> None:
    with NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        try:
            config = NodeConfig.from_yaml(file.name, environ or {})
        except ConfigError:
            return
        assert config.lmcache_instance_id


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | st.binary(max_size=60).map(NEEDED.encode().__add__))
def test_any_bytes_are_a_configuration_or_are_refused(content: bytes) -> None:
    take_or_refuse(content)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_values_of_any_keys_are_taken_or_refused(values: dict[str, Any]) -> None:
    take_or_refuse(yaml.dump({"lmcache_instance_id": "a", "lmcache_worker_port": 8002, **values}).encode())


@given(st.dictionaries(KEYS.map(lambda key: f"P2PKV_{key.upper()}"), st.text(max_size=30), max_size=6))
def test_any_variables_are_taken_or_refused(environ: dict[str, str]) -> None:
    take_or_refuse(NEEDED.encode(), environ)


# --- gossip ---------------------------------------------------------------------------------------------------------------


def test_timers_are_those_of_a_preset_with_changes_for_any_number_of_members(write: Write) -> None:
    config = NodeConfig.from_yaml(write(f"{NEEDED}gossip: {{preset: wan, probe_timeout_s: 1, indirect_count: 5}}\n"), {})
    for n in (1, 3, 100):
        assert config.gossip.timers_of(n) == replace(wan(n), probe_timeout_s=1.0, indirect_count=5)
    assert NodeConfig.from_yaml(write(NEEDED), {}).gossip.timers_of is lan
    environ = {"P2PKV_GOSSIP": "{preset: local}"}
    assert NodeConfig.from_yaml(write(NEEDED), environ).gossip.timers_of is local


def test_every_timer_can_be_changed() -> None:
    assert set(GossipConfig.model_fields) - {"preset"} == {each.name for each in fields(Timers)}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("{probe_s: 1}", "gossip[probe_s]: unknown key"),
        ("{preset: moon}", "gossip[preset]: should be 'lan', 'wan' or 'local', not 'moon'"),
        ("{probe_interval_s: 0}", "gossip[probe_interval_s]: should be greater than or equal to 0.001, not 0"),
        ("{gossip_fanout: true}", "gossip[gossip_fanout]: must be a number, not True"),
        ("{retransmits: 1.5}", "gossip[retransmits]: should be a valid integer"),
        ("{probe_timeout_s: 0.6}", "gossip: probe_interval_s must be at least 2 times probe_timeout_s: they are 1 and 0.6"),
        ("{suspicion_max_s: 1}", "gossip: suspicion_max_s must be at least suspicion_min_s: they are 1 and 3"),
        ("fast", "gossip: should be a valid dictionary"),
        ("'{preset: wan'", "gossip: must be a mapping, as {preset: wan}"),
    ],
)
def test_timers_that_make_no_sense_are_refused_by_name(write: Write, value: str, sentence: str) -> None:
    assert sentence in problems(write(f"{NEEDED}gossip: {value}\n"))


def test_a_disk_is_written_as_lmcache_writes_it_and_needs_a_limit(write: Write) -> None:
    config = NodeConfig.from_yaml(write(f"{NEEDED}local_disk: file:///tmp/chunks/\nmax_local_disk_size: 0.5\n"), {})
    assert (config.local_disk, config.disk_limit_nbytes) == (Path("/tmp/chunks"), 2**29)
    assert NodeConfig.from_yaml(write(f"{NEEDED}max_local_disk_size: 5\n"), {}).disk_limit_nbytes == 0
    with pytest.raises(ConfigError, match="max_local_disk_size: must be above 0, as local_disk has a limit"):
        NodeConfig.from_yaml(write(f"{NEEDED}local_disk: file:///tmp/chunks\n"), {})

"""The configuration beyond loopback: what it asks for, and that it never repeats a key."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from p2pkv.config import NodeConfig
from p2pkv.errors import ConfigError

KEY = "a key of thirty-two bytes or more"
NEEDED = "lmcache_instance_id: a\nlmcache_worker_port: 8002\n"
READY = f"{NEEDED}cluster_key: {KEY}\ninsecure_network: true\n"


def read(folder: Path, text: str, environ: dict[str, str] | None = None) -> NodeConfig:
    path = folder / "instance.yaml"
    path.write_text(text)
    return NodeConfig.from_yaml(path, environ or {})


def problems(folder: Path, text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, environ)
    return str(caught.value)


BEYOND = pytest.mark.parametrize(
    "line",
    [
        "bind_host: 10.0.0.1",
        "advertise_host: example.org",
        "contacts: ['10.0.0.1:8002']",
        "controller_url: example.org:9001",
        "controller_http_url: 192.168.0.1:9000",
        "distributed_url: '[fd00::1]:8004'",
    ],
)


@BEYOND
def test_what_is_beyond_loopback_is_refused_with_what_to_set(tmp_path: Path, line: str) -> None:
    text = problems(tmp_path, f"{NEEDED}{line}\n")
    assert f"{line.partition(':')[0]}" in text
    assert "is beyond loopback, which needs cluster_key_file: " in text
    assert "and insecure_network: true, as nothing is encrypted" in text


@BEYOND
def test_half_of_it_is_not_enough_and_only_the_rest_is_asked_for(tmp_path: Path, line: str) -> None:
    without_key = problems(tmp_path, f"{NEEDED}insecure_network: true\n{line}\n")
    assert "needs cluster_key_file: " in without_key
    assert "insecure_network" not in without_key
    with_key = problems(tmp_path, f"{NEEDED}cluster_key: {KEY}\n{line}\n")
    assert "needs insecure_network: true" in with_key
    assert "cluster_key" not in with_key


@BEYOND
def test_with_key_and_consent_it_is_taken(tmp_path: Path, line: str) -> None:
    assert read(tmp_path, f"{READY}{line}\n").insecure_network
    assert read(tmp_path, f"{NEEDED}cluster_key_file: /key\ninsecure_network: true\n{line}\n").cluster_key_file == Path("/key")


def test_what_is_told_to_others_must_be_an_address_that_they_can_reach(tmp_path: Path) -> None:
    assert "advertise_host: must be the address at which" in problems(tmp_path, f"{READY}bind_host: 0.0.0.0\n")
    assert "advertise_host: must be the address at which" in problems(tmp_path, f"{READY}bind_host: '::'\n")
    assert "distributed_url: must be the address at which" in problems(tmp_path, f"{READY}distributed_url: 0.0.0.0:1\n")
    config = read(tmp_path, f"{READY}bind_host: 0.0.0.0\nadvertise_host: 10.0.0.1\n")
    assert (config.bind_host, config.advertise_host) == ("0.0.0.0", "10.0.0.1")


@pytest.mark.parametrize("line", ["advertise_host: localhost", "distributed_url: localhost:8004"])
def test_a_node_beyond_loopback_does_not_tell_others_to_dial_themselves(tmp_path: Path, line: str) -> None:
    text = problems(tmp_path, f"{READY}bind_host: 10.0.0.1\n{line}\n")
    assert f"{line.partition(':')[0]}: must be the address at which other nodes reach this one" in text


@pytest.mark.parametrize("host", ["''", "a b", "-a", "a/b", "http://a", "'ä'", "5", "a" * 254])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    assert "bind_host: " in problems(tmp_path, f"{READY}bind_host: {host}\n")


def test_networks_are_cidrs_of_either_family(tmp_path: Path) -> None:
    networks = read(tmp_path, f"{NEEDED}allowed_peer_networks: [10.0.0.0/8, 'fd00::/8', 192.0.2.7]\n").allowed_peer_networks
    assert list(map(str, networks or ())) == ["10.0.0.0/8", "fd00::/8", "192.0.2.7/32"]
    named = read(tmp_path, NEEDED, {"P2PKV_ALLOWED_PEER_NETWORKS": "10.0.0.0/8, 10.0.0.0/24"}).allowed_peer_networks
    assert len(named or ()) == 2
    assert "allowed_peer_networks[0]: must be a network, as 10.0.0.0/24: " in problems(
        tmp_path, f"{NEEDED}allowed_peer_networks: [10.0.0.1/8]\n"
    )


@pytest.mark.parametrize(
    "key", ["short", "31 bytes are not quite enough. ", "12345678901234567890123456789012345", "[a, b]", "''"]
)
def test_a_key_that_is_none_is_refused_and_not_repeated(tmp_path: Path, key: str) -> None:
    text = problems(tmp_path, f"{NEEDED}cluster_key: {key}\nbind_host: 10.0.0.1\ninsecure_network: true\n")
    assert "cluster_key: must be a text of 32 to 4096 bytes" in text
    assert "has a problem" in text, "that the key is wrong doesn't make it a missing one"
    assert key.strip("'") not in text.replace("must be a text of 32 to 4096 bytes", "") or key == "''"


def test_a_key_is_given_in_one_place(tmp_path: Path) -> None:
    text = problems(tmp_path, f"{NEEDED}cluster_key: {KEY}\ncluster_key_file: /key\n")
    assert "cluster_key_file: give either it or cluster_key" in text
    assert KEY not in text


def test_a_key_from_the_environment_is_not_repeated_either(tmp_path: Path) -> None:
    text = problems(tmp_path, NEEDED, {"P2PKV_CLUSTER_KEY": "too short"})
    assert "P2PKV_CLUSTER_KEY: must be a text of 32 to 4096 bytes" in text
    assert "too short" not in text


def test_a_clients_token_is_no_key_of_the_configuration(tmp_path: Path) -> None:
    assert read(tmp_path, NEEDED, {"P2PKV_TOKEN": "anything"}).warnings == ()


def test_programs_that_validate_by_themselves_are_not_shown_the_key_in_errors() -> None:
    with pytest.raises(ValidationError) as caught:
        NodeConfig.model_validate({"lmcache_instance_id": "a", "cluster_key": "a short secret"})
    assert "a short secret" not in str(caught.value)

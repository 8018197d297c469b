"""The cluster's key: how it is derived from, where it comes from, and whose it must be."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from p2pkv.cluster_key import ClusterKey, Purpose, access_token, configured_key, hkdf_sha256, user_key
from p2pkv.config import NodeConfig
from p2pkv.errors import ConfigError
from p2pkv.rendezvous import user_folder

KEY = "a key of thirty-two bytes or more"
NEEDED: dict[str, object] = {"lmcache_instance_id": "a", "lmcache_worker_port": 1}


def key_file(folder: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def config_of(**keys: object) -> NodeConfig:
    return NodeConfig.model_validate({**NEEDED, **keys})


@pytest.mark.parametrize(
    ("secret", "salt", "info", "nbytes", "output"),
    [
        (
            "0b" * 22,
            "000102030405060708090a0b0c",
            "f0f1f2f3f4f5f6f7f8f9",
            42,
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(0x50)).hex(),
            bytes(range(0x60, 0xB0)).hex(),
            bytes(range(0xB0, 0x100)).hex(),
            82,
            (
                "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
                "cc30c58179ec3e87c14c01d5c1f3434f1d87"
            ),
        ),
        (
            "0b" * 22,
            "",
            "",
            42,
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
    ids=["A.1", "A.2", "A.3"],
)
def test_derivation_has_the_values_of_rfc_5869(secret: str, salt: str, info: str, nbytes: int, output: str) -> None:
    derived = hkdf_sha256(bytes.fromhex(secret), salt=bytes.fromhex(salt), info=bytes.fromhex(info), nbytes=nbytes)
    assert derived.hex() == output


def test_each_purpose_cluster_and_key_has_a_subkey_of_its_own() -> None:
    keys = [ClusterKey(cluster, secret) for cluster in ("p2pkv", "other") for secret in (b"1" * 32, b"2" * 32)]
    subkeys = {key.subkey(purpose) for key in keys for purpose in Purpose}
    assert len(subkeys) == len(keys) * len(Purpose)
    assert {len(subkey) for subkey in subkeys} == {32}


def test_the_key_is_the_bytes_of_its_text_and_a_files_last_newline_is_none_of_them(tmp_path: Path) -> None:
    written = configured_key(config_of(cluster_key=KEY))
    assert written == configured_key(config_of(cluster_key_file=key_file(tmp_path, f"{KEY}\n")))
    assert written == ClusterKey("p2pkv", KEY.encode())


def test_without_a_key_in_the_configuration_none_is_configured() -> None:
    assert configured_key(config_of()) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, KEY, mode)
    with pytest.raises(ConfigError, match=f"cluster_key_file: {path} must be a file of yours .*chmod 600") as caught:
        configured_key(config_of(cluster_key_file=path))
    assert KEY not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path, KEY)
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="must be a file of yours"):
        configured_key(config_of(cluster_key_file=path))


@pytest.mark.parametrize("content", ["", "\n", "x" * 31, "x" * 31 + "\r\n", "x" * 4097, b"\xff" * 100_000])
def test_a_key_file_that_is_too_short_or_too_long_is_refused(tmp_path: Path, content: str | bytes) -> None:
    with pytest.raises(ConfigError, match="must hold 32 to 4096 bytes"):
        configured_key(config_of(cluster_key_file=key_file(tmp_path, content)))


def test_what_is_no_file_is_refused_and_nothing_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        configured_key(config_of(cluster_key_file=tmp_path / "missing"))
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="cluster_key_file: "):
            configured_key(config_of(cluster_key_file=path))


def test_a_mounted_secret_may_be_a_link(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(key_file(tmp_path, KEY))
    assert configured_key(config_of(cluster_key_file=link)) == ClusterKey("p2pkv", KEY.encode())


# --- the user's own -------------------------------------------------------------------------------------------------------


def test_the_users_key_is_made_once_and_for_the_user_alone(tmp_path: Path) -> None:
    folder = user_folder({"XDG_RUNTIME_DIR": str(tmp_path)}, "p2pkv")
    with ThreadPoolExecutor(8) as several:
        keys = set(several.map(lambda _: user_key(folder, "p2pkv"), range(8)))
    assert len(keys) == 1
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]
    assert user_key(folder, "p2pkv") in keys


def test_it_is_the_same_wherever_the_users_nodes_meet_and_another_for_another_cluster(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    folders = [user_folder({**environ, "P2PKV_RUNTIME_DIR": str(tmp_path / name)}, "p2pkv") for name in ("x", "y")]
    key = user_key(folders[0], "p2pkv")
    assert user_key(folders[1], "p2pkv") == key
    assert user_key(user_folder(environ, "other"), "other").secret != key.secret


def test_a_users_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    folder = user_folder({"XDG_RUNTIME_DIR": str(tmp_path)}, "p2pkv")
    user_key(folder, "p2pkv")
    next(folder.iterdir()).chmod(0o644)
    with pytest.raises(ConfigError, match="must be a file of yours that nobody else may read"):
        user_key(folder, "p2pkv")


# --- a client's token -----------------------------------------------------------------------------------------------------


def test_a_client_shows_the_token_it_is_given_or_the_full_one_of_the_key_it_knows(tmp_path: Path) -> None:
    full = ClusterKey("p2pkv", KEY.encode()).token(Purpose.FULL_ACCESS)
    file = key_file(tmp_path, KEY)
    (tmp_path / "a.yaml").write_text(f"lmcache_instance_id: a\nlmcache_worker_port: 1\ncluster_key_file: {file}\n")
    assert access_token({"P2PKV_TOKEN": "given", "P2PKV_CLUSTER_KEY": KEY}) == "given"
    assert access_token({"P2PKV_CLUSTER_KEY": KEY}) == full
    assert access_token({"P2PKV_CLUSTER_KEY_FILE": str(file)}) == full
    assert access_token({"P2PKV_CONFIG_FILE": str(tmp_path / "a.yaml")}) == full
    assert access_token({"P2PKV_CLUSTER_KEY": KEY, "P2PKV_CLUSTER": "other"}) not in (None, full)


def test_a_client_that_knows_no_key_shows_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lmcache_instance_id: a\nlmcache_worker_port: 1\n")
    assert access_token({}) is None
    assert access_token({"LMCACHE_CONFIG_FILE": str(tmp_path / "a.yaml")}) is None


@pytest.mark.parametrize("token", ["a\nb", "ä", "\x00"])
def test_what_no_header_can_carry_is_no_token(token: str) -> None:
    with pytest.raises(ConfigError, match="P2PKV_TOKEN can be no token"):
        access_token({"P2PKV_TOKEN": token})


def test_keys_and_configurations_never_show_the_secret(tmp_path: Path) -> None:
    shown = [
        repr(ClusterKey("p2pkv", KEY.encode())),
        repr(config_of(cluster_key=KEY)),
        str(config_of(cluster_key=KEY).model_dump()),
    ]
    assert not any(KEY in text for text in shown)

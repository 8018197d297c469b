"""The cluster's key: where it comes from, and what is derived from it, a subkey for each purpose.

Whoever holds the key belongs to the cluster. It is what the user has configured (`cluster_key`, `cluster_key_file`; the bytes
of the text), or what a user's first node makes for all of them, so that nodes of one user on one host prove themselves to each
other without any configuration. It is never sent, logged or shown, and neither are subkeys; but the two for access, in
hexadecimal, are the tokens that clients show.
"""

import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from p2pkv.config import KEY_MAX_NBYTES, KEY_MIN_NBYTES, NodeConfig
from p2pkv.errors import ConfigError

USER_KEY_NAME = "~key"
"""In the user's folder of a cluster, where instances have folders too; but none has a `~` in its name."""
_HASH_NBYTES = 32
_SALT = b"p2pkv cluster key 1"


class Purpose(Enum):
    """What a subkey is for."""

    PEER_PROOF = b"peer proof"
    FULL_ACCESS = b"full access over HTTP and /control"
    READ_ONLY_ACCESS = b"read-only access over HTTP and /control"


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """The key of a cluster.

    Attributes:
        cluster: Its name: one key used for two clusters still gives each its own subkeys.
        secret: The key itself.
    """

    cluster: str
    secret: bytes = field(repr=False)

    def subkey(self, purpose: Purpose) -> bytes:
        """32 bytes that tell nothing of the key, nor of the subkey for another purpose."""
        return hkdf_sha256(self.secret, salt=_SALT, info=purpose.value + b"\0" + self.cluster.encode(), nbytes=_HASH_NBYTES)

    def token(self, purpose: Purpose) -> str:
        """The subkey as a bearer token."""
        return self.subkey(purpose).hex()


def hkdf_sha256(secret: bytes, *, salt: bytes, info: bytes, nbytes: int) -> bytes:
    """HKDF with SHA-256: `nbytes` (at most 8160) derived from `secret` for the use that `info` names.

    Source: RFC 5869, sections 2.2 and 2.3.
    """
    pseudorandom_key = hmac.digest(salt or bytes(_HASH_NBYTES), secret, "sha256")
    output = block = b""
    for counter in range(1, -(-nbytes // _HASH_NBYTES) + 1):
        block = hmac.digest(pseudorandom_key, block + info + bytes([counter]), "sha256")
        output += block
    return output[:nbytes]


# --- where it comes from --------------------------------------------------------------------------------------------------


def configured_key(config: NodeConfig) -> ClusterKey | None:
    """The key that the user has configured; None without one.

    Raises:
        ConfigError: Its file can't be read, isn't this user's alone, or holds no key.
    """
    if config.cluster_key is not None:
        return ClusterKey(config.cluster, config.cluster_key.get_secret_value().encode())
    if config.cluster_key_file is not None:
        return ClusterKey(config.cluster, _read_key(config.cluster_key_file, "cluster_key_file"))
    return None


def user_key(folder: Path, cluster: str) -> ClusterKey:
    """The key that this user's nodes of `cluster` share where none is configured; the first of them makes it.

    Args:
        folder: As `user_folder` gives it.
        cluster: Its name.

    Raises:
        ConfigError: The file can't be made or read, or isn't this user's alone.
    """
    path = folder / USER_KEY_NAME
    if not path.exists():
        draft = folder / f"{USER_KEY_NAME}.{secrets.token_hex(8)}"
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(KEY_MIN_NBYTES))
            _link_unless_there(draft, path)
        except OSError as error:
            raise ConfigError(f"the key of this user's nodes, {path}, can't be made: {error.strerror}") from error
        finally:
            draft.unlink(missing_ok=True)
    return ClusterKey(cluster, _read_key(path, "the key of this user's nodes"))


def access_token(environ: Mapping[str, str]) -> str | None:
    """The token that a client of this cluster shows: `P2PKV_TOKEN`, or the full one of the configured key; None without both.

    Raises:
        ConfigError: The token, the configuration that `environ` names, or the key in it, can't be used.
    """
    if token := environ.get("P2PKV_TOKEN"):
        if not (token.isascii() and token.isprintable()):
            raise ConfigError("P2PKV_TOKEN can be no token; set it to what `p2pkv token` prints")
        return token
    key = key_of_client(environ)
    return None if key is None else key.token(Purpose.FULL_ACCESS)


def key_of_client(environ: Mapping[str, str]) -> ClusterKey | None:
    """The configured key of the cluster that `environ` names; None without one.

    Raises:
        ConfigError: The configuration that `environ` names, or the key in it, can't be used.
    """
    names = ("P2PKV_CONFIG_FILE", "LMCACHE_CONFIG_FILE", "P2PKV_CLUSTER_KEY", "P2PKV_CLUSTER_KEY_FILE")
    if not any(environ.get(name) for name in names):
        return None
    return configured_key(NodeConfig.of_client(environ))


def _link_unless_there(draft: Path, path: Path) -> None:
    """Give a complete file its name in one step: of several nodes that start together, one's key is everyone's."""
    with suppress(FileExistsError):
        path.hardlink_to(draft)


def _read_key(path: Path, what: str) -> bytes:
    try:
        # Not waiting: a pipe would hang the start. A link is followed: that is how secrets are mounted into containers.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            secret = file.read(KEY_MAX_NBYTES + 2).rstrip(b"\r\n") if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise ConfigError(f"{what}: {path} can't be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(f"{what}: {path} must be a file of yours that nobody else may read (chmod 600 {path})")
    if not KEY_MIN_NBYTES <= len(secret) <= KEY_MAX_NBYTES:
        raise ConfigError(f"{what}: {path} must hold {KEY_MIN_NBYTES} to {KEY_MAX_NBYTES} bytes, not {len(secret)}")
    return secret

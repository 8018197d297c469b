"""The runtime directory, where the nodes of one user on one host meet, and where their engines find them.

    <directory>/<cluster>/<instance>/    lock  card.json  engine.sock  lane.sock  shared.sock  node.log

A node that lives holds a lock on its instance's `lock`; its card says where its doors are. The lock is an open file description
lock: it goes with the process, however that ends, and others can ask whether it is held without taking it for a moment
themselves, so that asking never makes a starting node fail. A card stays behind, so that the next boot is a later generation.
"""

import fcntl
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from p2pkv.errors import ConfigError, ErrorCode, Failure, InstanceIdInUseError

SOCKET_PATH_MAX_NBYTES = 107
"""Linux gives a unix socket's path 108 bytes, one of them for the NUL."""
CARD_MAX_NBYTES = 4096
"""A card has eight short fields; anything longer isn't one."""
_FLOCK = "hhqqi"
"""`struct flock` of a 64-bit Linux: type, whence, start, length, process."""


@dataclass(frozen=True, slots=True)
class NodeCard:
    """Where a node's doors are.

    Attributes:
        instance: Its name.
        generation: Which boot of it.
        pid: Its process.
        ws: `host:port` of its websocket door.
        http: URL of its own HTTP shim.
        transfer: `host:port` of its transfer address.
        shared: URL of the shared HTTP port if it answers there; None when it doesn't.
        rendezvous: `host:port` of the shared websocket door if it answers there; None when it doesn't.
    """

    instance: str
    generation: int
    pid: int
    ws: str
    http: str
    transfer: str
    shared: str | None
    rendezvous: str | None


_CARD_TYPES = get_type_hints(NodeCard)


@dataclass(frozen=True, slots=True)
class Place:
    """One instance's folder in the runtime directory; `place_of` makes it."""

    folder: Path
    instance: str

    @property
    def lock(self) -> Path:
        """Locked by the living node."""
        return self.folder / "lock"

    @property
    def card(self) -> Path:
        """The `NodeCard` as JSON."""
        return self.folder / "card.json"

    @property
    def engine_socket(self) -> Path:
        """Where engines attach."""
        return self.folder / "engine.sock"

    @property
    def lane_socket(self) -> Path:
        """Where other nodes fetch descriptors."""
        return self.folder / "lane.sock"

    @property
    def shared_socket(self) -> Path:
        """Where other nodes get the listening sockets of the shared ports."""
        return self.folder / "shared.sock"

    @property
    def log(self) -> Path:
        """Where a node that an engine started writes its log."""
        return self.folder / "node.log"


def runtime_directory(environ: Mapping[str, str]) -> Path:
    """The directory where this user's nodes meet, made if it isn't there.

    `$P2PKV_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/p2pkv`, else one for this user under the temporary directory.

    Raises:
        ConfigError: It can't be made, isn't this user's, or others may enter it.
    """
    chosen = environ.get("P2PKV_RUNTIME_DIR")
    directory = Path(chosen).absolute() if chosen else _user_directory(environ)
    _make_private(directory, "set P2PKV_RUNTIME_DIR to another")
    return directory


def user_folder(environ: Mapping[str, str], cluster: str) -> Path:
    """Where this user's nodes of `cluster` keep what they share wherever they meet, made if it isn't there.

    Raises:
        ConfigError: As `runtime_directory`.
    """
    folder = _user_directory(environ) / cluster
    for directory in (folder.parent, folder):
        _make_private(directory, "set cluster_key_file")
    return folder


def place_of(directory: Path, cluster: str, instance: str) -> Place:
    """The folder of `instance` in `cluster`; nothing is made.

    Args:
        directory: The runtime directory.
        cluster: A valid cluster name.
        instance: A valid instance id.

    Raises:
        ConfigError: The paths of its sockets would be too long for the system.
    """
    place = Place(directory / cluster / instance, instance)
    if (nbytes := len(os.fsencode(place.engine_socket))) > SOCKET_PATH_MAX_NBYTES:
        raise ConfigError(
            f"{place.engine_socket} has {nbytes} bytes, and a unix socket's path may have {SOCKET_PATH_MAX_NBYTES}: "
            "set P2PKV_RUNTIME_DIR to a shorter directory"
        )
    return place


@contextmanager
def claim(place: Place) -> Iterator[NodeCard | None]:
    """Be the living node of this instance until the exit.

    Yields:
        The card of the node that was here before, if it left one; it and the old sockets are gone.

    Raises:
        ConfigError: The folder can't be made, or isn't this user's alone.
        InstanceIdInUseError: Another node lives here.
    """
    sockets = (place.engine_socket, place.lane_socket, place.shared_socket)
    for folder in (place.folder.parent, place.folder):
        _make_private(folder, "set P2PKV_RUNTIME_DIR to another")
    with _open_lock(place, os.O_RDWR | os.O_CREAT) as descriptor:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK))
        except BlockingIOError:
            detail = f"A node named {place.instance!r} runs on this host already. Stop it, or choose another name."
            raise InstanceIdInUseError(Failure(ErrorCode.INSTANCE_ID_IN_USE, detail)) from None
        last = read_card(place)
        _remove(place.card, *sockets)
        try:
            yield last
        finally:
            _remove(*sockets)


def is_living(place: Place) -> bool:
    """Whether a node of this instance runs."""
    try:
        with _open_lock(place, os.O_RDWR) as descriptor:
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK))
    except OSError:
        return False
    lock_type: int = struct.unpack(_FLOCK, answer)[0]
    return lock_type != fcntl.F_UNLCK


def publish(place: Place, card: NodeCard) -> None:
    """Show `card` to the others, in one step. Only the node that claimed the place may."""
    draft = place.card.with_suffix(".new")
    draft.write_text(json.dumps(asdict(card)), encoding="utf-8")
    draft.replace(place.card)


def read_card(place: Place) -> NodeCard | None:
    """The card of the node that runs here, or that ran here last; None when there is none that can be read."""
    try:
        with place.card.open(encoding="utf-8") as file:
            fields = json.loads(file.read(CARD_MAX_NBYTES))
        card = NodeCard(**{name: fields[name] for name in _CARD_TYPES})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_sound = all(isinstance(getattr(card, name), kind) for name, kind in _CARD_TYPES.items())
    return card if is_sound and card.instance == place.instance else None


def living_cards(directory: Path, cluster: str) -> list[NodeCard]:
    """The cards of all nodes of `cluster` that run now, by name; what can't be read is left out."""
    cards = map(read_card, living_places(directory, cluster))
    return [card for card in cards if card is not None]


def living_places(directory: Path, cluster: str) -> list[Place]:
    """The places of all nodes of `cluster` that run now, by name; those that are just starting have no card yet."""
    try:
        names = sorted(folder.name for folder in (directory / cluster).iterdir())
    except OSError:
        return []
    return [place for name in names if is_living(place := Place(directory / cluster / name, name))]


def _user_directory(environ: Mapping[str, str]) -> Path:
    if session := environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "p2pkv"
    return Path(environ.get("TMPDIR") or "/tmp") / f"p2pkv-{os.geteuid()}"  # noqa: S108 - ownership is checked


def _make_private(directory: Path, instead: str) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise ConfigError(f"the runtime directory {directory} can't be used: {error.strerror}; {instead}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"the runtime directory {directory} must be a directory of yours that nobody else may enter (mode 0700); "
            f"change it, or {instead}"
        )


@contextmanager
def _open_lock(place: Place, flags: int) -> Iterator[int]:
    descriptor = os.open(place.lock, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _flock(lock_type: int) -> bytes:
    return struct.pack(_FLOCK, lock_type, os.SEEK_SET, 0, 0, 0)


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)

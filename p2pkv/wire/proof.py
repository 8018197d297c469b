"""What two nodes prove to each other on a new link before anything else, in an encoding that needs no parser.

    acceptor                                     dialer
    challenge     nonce                    ->
                                           <-    claim         nonce ‖ mac
    introduction  mac ‖ who                ->
                                           <-    introduction  mac ‖ who
    welcome       mac                      ->

    who = generation, 8 bytes ‖ number of versions, 1 byte ‖ versions, 2 bytes each ‖ instance, ASCII; numbers little-endian
    mac = HMAC-SHA256, by the peer subkey, of: step, cluster, door, TLS certificate's digest, both nonces, each `who` so far;
          each of them after its length, 4 bytes

The dialer proves first that it has the key, and tells who it is last; so neither says more than a random number to an end that
hasn't proven anything, and `who` is read only when its mac was found right. Each mac is of one step of one role, so none can be
sent back; both nonces are fresh, so none can be sent again.
"""

import hmac
import struct
from dataclasses import dataclass
from enum import Enum

from p2pkv.core.ids import Generation, InstanceId, is_instance_id
from p2pkv.errors import RemoteProtocolError

NONCE_NBYTES = 32
MAC_NBYTES = 32
MAX_VERSIONS = 16
"""As many as a `Hello` may name."""
_HEAD = struct.Struct("<QB")
MAX_PROOF_NBYTES = MAC_NBYTES + _HEAD.size + 2 * MAX_VERSIONS + 64
"""The longest frame: an introduction with the longest name."""


class Step(Enum):
    """What a mac proves; the value names protocol, role and step."""

    CLAIM = b"p2pkv peer 1 dialer claim"
    ACCEPTOR = b"p2pkv peer 1 acceptor introduction"
    DIALER = b"p2pkv peer 1 dialer introduction"
    WELCOME = b"p2pkv peer 1 acceptor welcome"


@dataclass(frozen=True, slots=True)
class Who:
    """One end of a link."""

    instance: InstanceId
    generation: Generation
    versions: tuple[int, ...]

    def encode(self) -> bytes:
        """Its bytes."""
        versions = struct.pack(f"<{len(self.versions)}H", *self.versions)
        return _HEAD.pack(self.generation, len(self.versions)) + versions + self.instance.encode("ascii")


def decode_who(data: bytes) -> Who:
    """Who `data` describes.

    Raises:
        RemoteProtocolError: It describes nobody.
    """
    try:
        generation, count = _HEAD.unpack_from(data)
        versions = struct.unpack_from(f"<{count}H", data, _HEAD.size)
        instance = data[_HEAD.size + 2 * count :].decode("ascii")
    except (struct.error, UnicodeDecodeError) as error:
        raise RemoteProtocolError("an introduction that can't be read") from error
    if not 1 <= count <= MAX_VERSIONS or generation >= 2**63 or not is_instance_id(instance):
        raise RemoteProtocolError("an introduction of nobody that could be")
    return Who(instance, generation, versions)


def proof_mac(key: bytes, step: Step, *told: bytes) -> bytes:
    """The mac of one step over all that was `told`, in the order that the module's description has."""
    fields = (step.value, *told)
    return hmac.digest(key, b"".join(struct.pack("<I", len(field)) + field for field in fields), "sha256")

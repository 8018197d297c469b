"""Proving on a new link that both ends belong to the cluster, before any message is read.

Who is wrong learns nothing but that it was refused: the connection is closed with that word, whatever was wrong, and the node's
own log has the reason. `wire/proof` has the steps and why they are enough.
"""

import hmac
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio
from trio_websocket import WebSocketConnection

from p2pkv.errors import RemoteProtocolError
from p2pkv.net.websockets import limit_messages
from p2pkv.wire.limits import MAX_MESSAGE_NBYTES
from p2pkv.wire.proof import MAC_NBYTES, MAX_PROOF_NBYTES, NONCE_NBYTES, Step, Who, decode_who, proof_mac

PROOF_S = 2.0
"""For all steps; on loopback they take 2 ms, and a busy Python process may stand still for 0.5 s."""


@dataclass(frozen=True, slots=True)
class Prover:
    """This node's part in proofs.

    Attributes:
        key: The cluster's subkey for them.
        cluster: The cluster's name.
        me: Who this node is.
        door: Path of the websocket that is proved.
        certificate_digest: Of the TLS certificate that the acceptor shows; empty without TLS.
    """

    key: bytes = field(repr=False)
    cluster: str
    me: Who
    door: str
    certificate_digest: bytes = b""

    async def prove_to_acceptor(self, websocket: WebSocketConnection) -> Who:
        """Prove that this node, which has dialed, belongs to the cluster; learn who has accepted, and that it does too.

        Raises:
            RemoteProtocolError: It proved nothing, or not in time. Close the websocket, and say no more than that.
            ConnectionClosed: It closed the websocket.
        """
        with _one_proof(websocket):
            challenge = await _receive(websocket, NONCE_NBYTES)
            nonce = secrets.token_bytes(NONCE_NBYTES)
            mac = self._mac(challenge, nonce)
            await websocket.send_message(nonce + mac(Step.CLAIM))
            who, its_mac = _split(await _receive(websocket))
            _check(its_mac, mac(Step.ACCEPTOR, who))
            acceptor, mine = decode_who(who), self.me.encode()
            limit_messages(websocket, MAX_MESSAGE_NBYTES)  # before it is welcome to send messages, which may follow at once
            await websocket.send_message(mac(Step.DIALER, who, mine) + mine)
            _check(await _receive(websocket), mac(Step.WELCOME, who, mine))
        return acceptor

    async def prove_to_dialer(self, websocket: WebSocketConnection) -> Who:
        """The same for the node that has accepted the websocket."""
        with _one_proof(websocket):
            challenge = secrets.token_bytes(NONCE_NBYTES)
            await websocket.send_message(challenge)
            claim = await _receive(websocket, NONCE_NBYTES + MAC_NBYTES)
            mac = self._mac(challenge, claim[:NONCE_NBYTES])
            _check(claim[NONCE_NBYTES:], mac(Step.CLAIM))
            mine = self.me.encode()
            await websocket.send_message(mac(Step.ACCEPTOR, mine) + mine)
            who, its_mac = _split(await _receive(websocket))
            _check(its_mac, mac(Step.DIALER, mine, who))
            dialer = decode_who(who)
            limit_messages(websocket, MAX_MESSAGE_NBYTES)
            await websocket.send_message(mac(Step.WELCOME, mine, who))
        return dialer

    def _mac(self, challenge: bytes, nonce: bytes) -> Callable[..., bytes]:
        """Makes the macs of one link from a step, and what both ends have told of themselves so far."""
        link = (self.cluster.encode(), self.door.encode(), self.certificate_digest, challenge, nonce)
        return lambda step, *told: proof_mac(self.key, step, *link, *told)


@contextmanager
def _one_proof(websocket: WebSocketConnection) -> Iterator[None]:
    limit_messages(websocket, MAX_PROOF_NBYTES)
    try:
        with trio.fail_after(PROOF_S):
            yield
    except trio.TooSlowError as error:
        raise RemoteProtocolError(f"it has proved nothing within {PROOF_S:g} s") from error


async def _receive(websocket: WebSocketConnection, nbytes: int | None = None) -> bytes:
    frame = await websocket.get_message()
    if isinstance(frame, str) or len(frame) != (nbytes or len(frame)):
        raise RemoteProtocolError("what came is no step of a proof")
    return frame


def _split(introduction: bytes) -> tuple[bytes, bytes]:
    return introduction[MAC_NBYTES:], introduction[:MAC_NBYTES]


def _check(received: bytes, right: bytes) -> None:
    if not hmac.compare_digest(received, right):
        raise RemoteProtocolError("its proof is wrong; do both nodes have the same cluster and cluster_key?")

"""Whose chunks a request's are, by what vLLM says of the request; and which requests can't say it exactly.

    cache salt      as it is
    LoRA adapter    by a digest of its files, taken when the adapter is first seen
    media           by a digest of the processed input itself: vLLM's own hash of it may be a name that the client chose
    forget          what is stored from then on belongs to a random mark, which stands as media of no length

A request that has anything else in its KV than these and its tokens bypasses the cache.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from p2pkv.core.keys import MAX_TOKENS, Identity, Media

SALT_MAX_LENGTH = 1024
MEDIA_MAX_COUNT = 1023
"""As `core.keys.Identity` has them, less one for the mark."""
ADAPTERS_MAX_COUNT = 10_000
"""Digests that are remembered, of 64 bytes. One can't be taken anew: the files may have changed since vLLM loaded them."""
_READ_NBYTES = 2**20


class Bypass(StrEnum):
    """Why a request goes without the cache."""

    PROMPT_EMBEDS = "prompt_embeds"
    STREAMING_INPUT = "streaming_input"
    LONG_PROMPT = "long_prompt"
    LONG_SALT = "long_salt"
    LORA_FILES = "lora_files"
    LORA_RELOADED = "lora_reloaded"
    LORA_TOO_MANY = "lora_too_many"
    MEDIA_TOO_MANY = "media_too_many"
    MEDIA_UNKNOWN = "media_unknown"
    FORGOTTEN = "forgotten"


class Identities:
    """Tells requests' identities. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._adapters: dict[tuple[int, str], str | Bypass] = {}
        self._mark: tuple[Media, ...] = ()

    def forget(self) -> None:
        """From now on nobody is who they were, so that nothing stored before is found by this engine.

        The weights may have been changed in the running engine. What it stores from now on is its own alone.
        """
        self._mark = (Media(0, 0, os.urandom(16)),)

    def quick(self, request: Any) -> Identity | Bypass | None:
        """The identity of a request that needs no digest; None for one that does.

        Args:
            request: A `vllm.v1.request.Request`.
        """
        if request.prompt_embeds is not None or request.prompt_is_token_ids is not None:
            return Bypass.PROMPT_EMBEDS
        if request.resumable:
            return Bypass.STREAMING_INPUT
        if request.num_prompt_tokens > MAX_TOKENS:
            return Bypass.LONG_PROMPT
        if len(request.cache_salt or "") > SALT_MAX_LENGTH:
            return Bypass.LONG_SALT
        if len(request.mm_features) > MEDIA_MAX_COUNT:
            return Bypass.MEDIA_TOO_MANY
        if request.lora_request is not None or request.mm_features:
            return None
        return Identity(cache_salt=request.cache_salt or "", media=self._mark)

    def identify(self, request: Any) -> Identity | Bypass:
        """The identity of a request for which `quick` said None; takes as long as hashing its media and adapter does."""
        lora: str | Bypass = ""
        if request.lora_request is not None:
            lora = self._adapter_digest(request.lora_request)
        if isinstance(lora, Bypass):
            return lora
        media = list(self._mark)
        for feature in request.mm_features:
            digest = _feature_digest(feature)
            if digest is None:
                return Bypass.MEDIA_UNKNOWN
            media.append(Media(feature.mm_position.offset, feature.mm_position.length, digest))
        media.sort(key=lambda item: item.offset)
        return Identity(cache_salt=request.cache_salt or "", lora=lora, media=tuple(media))

    def _adapter_digest(self, adapter: Any) -> str | Bypass:
        if adapter.load_inplace:
            return Bypass.LORA_RELOADED
        name = (adapter.lora_int_id, adapter.lora_path)
        with self._lock:
            if name not in self._adapters:
                if len(self._adapters) == ADAPTERS_MAX_COUNT:
                    return Bypass.LORA_TOO_MANY
                digest = _folder_digest(Path(adapter.lora_path))
                self._adapters[name] = Bypass.LORA_FILES if digest is None else f"{digest}:{adapter.is_3d_lora_weight}"
            return self._adapters[name]


def _folder_digest(folder: Path) -> str | None:
    """SHA-256 of the names and contents of the files in `folder`, which are all that vLLM reads; None if they can't be read."""
    hasher = hashlib.sha256()
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for path in files:
            _update(hasher.update, path.name.encode(), struct.pack("<q", path.stat().st_size))
            with path.open("rb") as file:
                while part := file.read(_READ_NBYTES):
                    hasher.update(part)
    except OSError:
        return None
    return hasher.hexdigest() if files else None


def _feature_digest(feature: Any) -> bytes | None:
    """SHA-256 of a processed picture, sound or the like, and of where it goes in its placeholder; None if that isn't known."""
    if feature.data is None:
        return None
    hasher = hashlib.sha256()
    try:
        _hash(hasher.update, [feature.modality, feature.mm_position.is_embed, feature.data])
    except TypeError:
        return None
    return hasher.digest()


def _hash(update: Callable[[bytes | memoryview], None], value: Any) -> None:
    """Hash a tree of plain values and tensors, typed and length-prefixed.

    Raises:
        TypeError: There is something else in it.
    """
    match value:
        case torch.Tensor():
            _update(update, b"tensor", str(value.dtype).encode(), str(tuple(value.shape)).encode())
            update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        case None | bool() | int() | float() | str():
            _update(update, type(value).__name__.encode(), repr(value).encode())
        case bytes():
            _update(update, b"bytes", value)
        case Mapping():
            _update(update, b"mapping", struct.pack("<q", len(value)))
            for key in sorted(value):
                _hash(update, key)
                _hash(update, value[key])
        case Sequence():
            _update(update, b"sequence", struct.pack("<q", len(value)))
            for item in value:
                _hash(update, item)
        case _ if hasattr(value, "__array__"):
            _hash(update, torch.from_numpy(value))
        case _ if hasattr(value, "data"):  # vLLM's MultiModalFieldElem
            _hash(update, value.data)
        case _:
            raise TypeError(f"{type(value).__name__} can't be hashed")


def _update(update: Callable[[bytes | memoryview], None], *parts: bytes) -> None:
    for part in parts:
        update(struct.pack("<q", len(part)) + part)

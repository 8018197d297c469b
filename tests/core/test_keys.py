"""Chunk keys: the same bytes on every machine, and never the same bytes for two meanings."""

import os
import struct
import subprocess
import sys
from dataclasses import replace
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.core.keys import (
    MAX_TOKEN_ID,
    Identity,
    Media,
    Namespace,
    chunk_key,
    fingerprint,
    full_chunk_keys,
    namespace_digest,
    pack_tokens,
    root_key,
    tail_keys,
    token_count,
)
from tests.core.builders import NAMESPACE, chunks_of, pack

LLAMA = Namespace(
    model="meta-llama/Llama-3.1-8B",
    weights="sha256:0123abcd",
    dtype="bfloat16",
    layers=32,
    planes=2,
    kv_heads=8,
    head_dim=128,
    chunk_size=256,
    world_size=2,
)
TENANT = Identity(
    cache_salt="tenant-ä",
    lora="adapter",
    media=(Media(offset=3, length=7, digest=b"\x01\x02"), Media(offset=40, length=1, digest=b"\xff" * 16)),
)

# --- test vectors: a change of any of them needs a new HASH_VERSION -------------------------------------------------------

LLAMA_DIGEST = "bf281514a18a13c838cdd92b62f57af3"
PLAIN_ROOT = "69aa9f8d7df08851905755b960af43a6"
TENANT_ROOT = "466757062396c5ff9947cab9bd40ae61"
KEYS_OF_600 = ["855b75aafde97065058d20b1dd26c5f5", "aca60a9feba6b5063ebed09fe2725739"]
KEY_OF_TAIL = "0632c19f9072a964f7ecad9053739d11"
FINGERPRINT_OF_FIRST = 0x855B75AAFDE97065
TOKENS_OF_600 = pack(*range(1, 601))


def test_the_digest_of_a_namespace_is_fixed() -> None:
    assert namespace_digest(LLAMA).hex() == LLAMA_DIGEST


def test_the_root_of_a_request_is_fixed() -> None:
    assert root_key(LLAMA, Identity()).hex() == PLAIN_ROOT
    assert root_key(LLAMA, TENANT).hex() == TENANT_ROOT


def test_the_keys_of_a_prompt_are_fixed() -> None:
    keys = full_chunk_keys(root_key(LLAMA, TENANT), TOKENS_OF_600, 256)
    assert [key.hex() for key in keys] == KEYS_OF_600
    assert chunk_key(keys[1], TOKENS_OF_600[2048:]).hex() == KEY_OF_TAIL
    assert fingerprint(keys[0]) == FINGERPRINT_OF_FIRST == int(KEYS_OF_600[0][:16], 16)


def test_a_key_is_what_the_protocol_says_it_is() -> None:
    """The whole construction again, by hand."""

    def text(value: str) -> bytes:
        return b"s" + struct.pack("<I", len(value.encode())) + value.encode()

    def number(value: int) -> bytes:
        return b"i" + struct.pack("<q", value)

    def blob(value: bytes) -> bytes:
        return b"b" + struct.pack("<I", len(value)) + value

    names = text("meta-llama/Llama-3.1-8B") + text("sha256:0123abcd") + text("bfloat16")
    numbers = b"".join(map(number, (32, 2, 8, 128, 256, 2, 1, 1)))
    digest = blake2b(names + numbers, digest_size=16, person=b"p2pkv-namespace").digest()
    media = number(3) + number(7) + blob(b"\x01\x02") + number(40) + number(1) + blob(b"\xff" * 16)
    identity = text("tenant-ä") + text("adapter") + number(2) + media
    root = blake2b(blob(digest) + identity, digest_size=16, person=b"p2pkv-root").digest()
    first = blake2b(root + struct.pack("<256i", *range(1, 257)), digest_size=16).digest()
    second = blake2b(first + struct.pack("<256i", *range(257, 513)), digest_size=16).digest()
    assert (digest.hex(), root.hex(), [first.hex(), second.hex()]) == (LLAMA_DIGEST, TENANT_ROOT, KEYS_OF_600)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_keys_are_the_same_in_every_process(hash_seed: str) -> None:
    code = (
        "from tests.core.test_keys import *; root = root_key(LLAMA, TENANT);"
        "print(root.hex(), *(key.hex() for key in full_chunk_keys(root, TOKENS_OF_600, 256)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [TENANT_ROOT, *KEYS_OF_600]


def test_tokens_are_little_endian_int32() -> None:
    assert pack_tokens([1, 256, MAX_TOKEN_ID]) == bytes.fromhex("01000000 00010000 ffffff7f")
    assert token_count(pack_tokens(range(3))) == 3
    assert pack_tokens([]) == b""


@pytest.mark.parametrize("wrong", [[-1], [MAX_TOKEN_ID + 1], [2**70], [1.5], ["1"], [None]])
def test_what_is_no_token_id_is_named(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match=f"integers from 0 to {MAX_TOKEN_ID}"):
        pack_tokens([5, *wrong])


# --- no two meanings share a key ------------------------------------------------------------------------------------------

texts = st.text(alphabet="ab\0", max_size=3)
medias = st.builds(
    Media,
    offset=st.integers(0, 2),
    length=st.integers(0, 2),
    digest=st.binary(min_size=1, max_size=2),
)
identities = st.builds(Identity, cache_salt=texts, lora=texts, media=st.lists(medias, max_size=2).map(tuple))


@given(identities, identities)
def test_two_identities_never_share_a_root(one: Identity, other: Identity) -> None:
    assert (root_key(NAMESPACE, one) == root_key(NAMESPACE, other)) == (one == other)


def test_a_salt_is_not_an_adapter_and_an_adapter_not_a_picture() -> None:
    roots = {
        root_key(NAMESPACE, Identity(cache_salt="x")),
        root_key(NAMESPACE, Identity(lora="x")),
        root_key(NAMESPACE, Identity(media=(Media(0, 0, b"x"),))),
        root_key(NAMESPACE, Identity(cache_salt="x", lora="x")),
        root_key(NAMESPACE, Identity(media=(Media(0, 1, b"x"),))),
        root_key(NAMESPACE, Identity(media=(Media(1, 0, b"x"),))),
        root_key(NAMESPACE, Identity(media=(Media(0, 0, b"x"), Media(0, 0, b"x")))),
        root_key(NAMESPACE, Identity()),
    }
    assert len(roots) == 8


@pytest.mark.parametrize(
    "other",
    [
        replace(LLAMA, model="meta-llama/Llama-3.1-8Bs"),
        replace(LLAMA, weights=""),
        replace(LLAMA, dtype="float16"),
        replace(LLAMA, layers=33),
        replace(LLAMA, planes=1),
        replace(LLAMA, kv_heads=4),
        replace(LLAMA, head_dim=64),
        replace(LLAMA, chunk_size=128),
        replace(LLAMA, world_size=1),
        replace(LLAMA, layout_version=2),
        replace(LLAMA, hash_version=2),
        replace(LLAMA, kv_heads=128, head_dim=8),
        replace(LLAMA, model=LLAMA.model + "s", weights=LLAMA.weights[1:]),
    ],
)
def test_every_field_of_a_namespace_counts(other: Namespace) -> None:
    assert namespace_digest(other) != namespace_digest(LLAMA)


def test_a_model_may_have_any_name() -> None:
    assert namespace_digest(replace(LLAMA, model="\ud800")) != namespace_digest(replace(LLAMA, model="\ud801"))


# --- chains ---------------------------------------------------------------------------------------------------------------

prompts = st.lists(st.integers(0, MAX_TOKEN_ID), max_size=20).map(lambda ids: pack(*ids))


@given(prompts, st.integers(1, 6))
def test_full_chunks_are_the_chain_without_its_tail(tokens: bytes, chunk_size: int) -> None:
    namespace = replace(NAMESPACE, chunk_size=chunk_size)
    chain = [chunk.key for chunk in chunks_of(tokens, namespace) if chunk.token_count == chunk_size]
    assert full_chunk_keys(root_key(namespace, Identity()), tokens, chunk_size) == chain


@given(st.binary(min_size=16, max_size=16), prompts)
def test_tail_keys_are_the_chunk_keys_of_every_beginning(parent: bytes, tokens: bytes) -> None:
    expected = [(count, chunk_key(parent, tokens[: count * 4])) for count in range(1, len(tokens) // 4 + 1)]
    assert list(tail_keys(parent, tokens)) == expected


# --- namespaces -----------------------------------------------------------------------------------------------------------


def test_a_shard_is_one_workers_heads() -> None:
    assert (LLAMA.shard_count(), LLAMA.shard_nbytes(256)) == (2, 32 * 2 * 256 * 4 * 128 * 2)


def test_the_joint_latent_of_mla_is_stored_once() -> None:
    mla = replace(LLAMA, planes=1, kv_heads=1, world_size=8)
    assert (mla.shard_count(), mla.shard_nbytes(10), mla.problem()) == (1, 32 * 10 * 128 * 2, None)


@pytest.mark.parametrize(
    ("namespace", "problem"),
    [
        (LLAMA, None),
        (replace(LLAMA, dtype="float13"), "dtype 'float13' is unknown"),
        (replace(LLAMA, world_size=3), "8 KV heads can't be shared out to 3 workers evenly"),
        (replace(LLAMA, hash_version=2), "its keys are made by hash version 2, this node's by 1"),
    ],
)
def test_a_namespace_says_why_it_cant_be_used(namespace: Namespace, problem: str | None) -> None:
    assert namespace.problem() == problem or str(namespace.problem()).startswith(str(problem))


def test_a_difference_names_the_fields() -> None:
    other = replace(LLAMA, dtype="float16", chunk_size=128)
    assert LLAMA.difference(other) == "dtype bfloat16 / float16, chunk_size 256 / 128"

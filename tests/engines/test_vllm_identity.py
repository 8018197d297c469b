"""Whose chunks a request's are."""

from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from p2pkv.core.keys import Identity
from p2pkv.engines.vllm.deployment import model_name
from p2pkv.engines.vllm.identity import Bypass, Identities
from p2pkv.engines.vllm.settings import Settings
from p2pkv.errors import ConfigError, UnsupportedCacheError


def request(**facts: Any) -> Any:
    plain: dict[str, Any] = {
        "prompt_embeds": None,
        "prompt_is_token_ids": None,
        "resumable": False,
        "num_prompt_tokens": 10,
        "cache_salt": None,
        "lora_request": None,
        "mm_features": [],
    }
    return SimpleNamespace(**{**plain, **facts})


def lora(folder: Path, number: int = 1, **facts: Any) -> Any:
    plain = {"lora_int_id": number, "lora_path": str(folder), "load_inplace": False, "is_3d_lora_weight": False}
    return SimpleNamespace(**{**plain, **facts})


def adapter(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def picture(pixels: torch.Tensor, *, mm_hash: str = "a name", offset: int = 3, length: int = 4, **more: Any) -> Any:
    """As vLLM's `MultiModalFeatureSpec`."""
    data = UserDict({"pixel_values": SimpleNamespace(data=pixels), **more})
    position = SimpleNamespace(offset=offset, length=length, is_embed=None)
    return SimpleNamespace(data=data, modality="image", mm_hash=mm_hash, identifier=mm_hash, mm_position=position)


def identity_of(identities: Identities, **facts: Any) -> Identity | Bypass:
    quick = identities.quick(request(**facts))
    return identities.identify(request(**facts)) if quick is None else quick


def test_a_plain_request_is_itself_and_a_salt_sets_it_apart() -> None:
    identities = Identities()
    assert identities.quick(request()) == Identity()
    assert identities.quick(request(cache_salt="one")) == Identity(cache_salt="one")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"prompt_embeds": torch.zeros(1, 1)}, Bypass.PROMPT_EMBEDS),
        ({"prompt_is_token_ids": [True]}, Bypass.PROMPT_EMBEDS),
        ({"resumable": True}, Bypass.STREAMING_INPUT),
        ({"num_prompt_tokens": 2**20 + 1}, Bypass.LONG_PROMPT),
        ({"cache_salt": "s" * 1025}, Bypass.LONG_SALT),
        ({"mm_features": [picture(torch.zeros(1))] * 1024}, Bypass.MEDIA_TOO_MANY),
    ],
)
def test_what_cannot_be_expressed_has_a_name(facts: dict[str, Any], reason: Bypass) -> None:
    assert Identities().quick(request(**facts)) is reason


# --- adapters -------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_known_by_its_files_wherever_they_lie(tmp_path: Path) -> None:
    identities = Identities()
    folders = [adapter(tmp_path / "one", b"x"), adapter(tmp_path / "copy", b"x"), adapter(tmp_path / "other", b"y")]
    found = [identity_of(identities, lora_request=lora(folder, number)) for number, folder in enumerate(folders)]
    assert found[0] == found[1] != found[2]
    assert all(isinstance(identity, Identity) and identity.lora for identity in found)
    assert identity_of(identities, lora_request=lora(folders[0], 0, is_3d_lora_weight=True)) == found[0]  # asked once
    assert identity_of(Identities(), lora_request=lora(folders[0], 0, is_3d_lora_weight=True)) != found[0]


def test_an_adapters_digest_is_that_of_when_it_was_first_seen(tmp_path: Path) -> None:
    identities, folder = Identities(), adapter(tmp_path / "one", b"x")
    before = identity_of(identities, lora_request=lora(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"z")
    assert identity_of(identities, lora_request=lora(folder)) == before
    assert identity_of(Identities(), lora_request=lora(folder)) != before


def test_adapters_without_files_or_that_may_change_bypass(tmp_path: Path) -> None:
    identities = Identities()
    assert identity_of(identities, lora_request=lora(tmp_path / "nowhere")) is Bypass.LORA_FILES
    folder = adapter(tmp_path / "one", b"x")
    assert identity_of(identities, lora_request=lora(folder, load_inplace=True)) is Bypass.LORA_RELOADED


# --- media ----------------------------------------------------------------------------------------------------------------


def test_media_are_known_by_what_they_are_not_by_what_they_are_called() -> None:
    identities = Identities()
    one, two = torch.rand(3, 4), torch.rand(3, 4)
    first = identity_of(identities, mm_features=[picture(one, mm_hash="a")])
    assert identity_of(identities, mm_features=[picture(one.clone(), mm_hash="b")]) == first
    assert identity_of(identities, mm_features=[picture(two, mm_hash="a")]) != first
    assert identity_of(identities, mm_features=[picture(one.view(4, 3), mm_hash="a")]) != first
    assert identity_of(identities, mm_features=[picture(one, grid=(1, 2))]) != first
    assert identity_of(identities, mm_features=[picture(one, offset=5)]) != first


def test_media_stand_in_the_order_of_their_offsets() -> None:
    features = [picture(torch.zeros(1), offset=8), picture(torch.ones(1), offset=2)]
    identity = identity_of(Identities(), mm_features=features)
    assert isinstance(identity, Identity)
    assert [(media.offset, media.length) for media in identity.media] == [(2, 4), (8, 4)]


@pytest.mark.parametrize("data", [None, {"pixels": object()}, {1: 2, "x": 3}])
def test_media_that_are_not_there_or_of_an_unknown_kind_bypass(data: Any) -> None:
    feature = picture(torch.zeros(1))
    feature.data = data
    assert identity_of(Identities(), mm_features=[feature]) is Bypass.MEDIA_UNKNOWN


@pytest.mark.parametrize(
    "value", [torch.rand(2).bfloat16(), torch.rand(2, 2).T, torch.tensor(1), torch.zeros(0), b"x", [1.5, "s"]]
)
def test_media_of_any_plain_kind_have_a_digest(value: Any) -> None:
    found = identity_of(Identities(), mm_features=[picture(torch.zeros(1), more=value)])
    assert isinstance(found, Identity)
    assert found != identity_of(Identities(), mm_features=[picture(torch.zeros(1), more=None)])


# --- the engine -----------------------------------------------------------------------------------------------------------


def test_who_forgets_finds_nothing_of_before_and_forgets_again_anew() -> None:
    identities = Identities()
    seen = [identities.quick(request())]
    for _ in range(2):
        identities.forget()
        seen.append(identities.quick(request()))
    assert len({repr(identity) for identity in seen}) == 3
    assert identities.quick(request()) == seen[-1]


def config(**facts: Any) -> Any:
    plain: dict[str, Any] = {
        "model": "meta-llama/Llama-3.1-8B",
        "revision": None,
        "code_revision": None,
        "quantization": None,
        "hf_overrides": {},
        "max_model_len": 2048,
        "seed": 0,
        "dtype": torch.bfloat16,
        "hf_text_config": SimpleNamespace(rope_parameters={"rope_type": "llama3"}),
    }
    cache_dtype, load_format = facts.pop("cache_dtype", "auto"), facts.pop("load_format", "auto")
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**plain, **facts}),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        load_config=SimpleNamespace(load_format=load_format),
    )


def test_a_models_name_is_its_own_unless_something_changes_its_kv() -> None:
    assert model_name(config(), None) == model_name(config(max_model_len=4096, seed=1), None) == "meta-llama/Llama-3.1-8B"
    changes: list[dict[str, Any]] = [
        {"revision": "main"},
        {"quantization": "awq"},
        {"hf_overrides": {"rope_theta": 1}},
        {"cache_dtype": "bfloat16"},
        {"load_format": "dummy"},
        {"load_format": "dummy", "seed": 1},
        {"hf_text_config": SimpleNamespace(rope_parameters={"rope_type": "longrope"})},
        {"hf_text_config": SimpleNamespace(rope_scaling={"type": "longrope"}), "max_model_len": 4096},
    ]
    names = [model_name(config(**change), None) for change in changes]
    assert len(set(names)) == len(changes)
    assert all(name.startswith("meta-llama/Llama-3.1-8B#") for name in names)


def test_a_name_that_the_operator_gives_stands_as_it_is() -> None:
    assert model_name(config(hf_overrides=print), "chosen") == "chosen"
    with pytest.raises(UnsupportedCacheError, match=r"model_overrides: .*p2pkv\.model"):
        model_name(config(hf_overrides=print), None)


def test_a_long_name_is_shortened_and_stays_its_own() -> None:
    names = {model_name(config(model=letter * 600, quantization=kind), None) for letter in "ab" for kind in (None, "awq")}
    assert len(names) == 4
    assert all(len(name) <= 512 for name in names)


def test_settings_are_read_and_other_connectors_keys_are_left_alone() -> None:
    extra = {"p2pkv.model": "m", "p2pkv.lookup_deadline_s": 1, "shared_storage_path": "/x"}
    assert Settings.from_extra_config(extra) == Settings(model="m", lookup_deadline_s=1)


def test_every_wrong_setting_is_named() -> None:
    wrong = {"load_deadline_s": "soon", "store_buffer_mib": 0, "model": "", "prefill_tokens_per_s": 0.5}
    extra = {f"p2pkv.{name}": value for name, value in {"lookup_deadine_s": 1, **wrong}.items()}
    with pytest.raises(ConfigError) as caught:
        Settings.from_extra_config(extra)
    assert "p2pkv.lookup_deadine_s: no such key; is p2pkv.lookup_deadline_s meant?" in str(caught.value)
    assert all(f"p2pkv.{name}: must" in str(caught.value) for name in wrong)

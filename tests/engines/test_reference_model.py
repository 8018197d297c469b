"""The tiny Llama is the same everywhere, and a model from a folder is taken as it is."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, PreTrainedConfig

from p2pkv.engines.reference.model import ReferenceModel, load_model, make_tiny_llama
from p2pkv.errors import ConfigError

SIZES: dict[str, Any] = {"vocab_size": 960, "hidden_size": 32, "num_attention_heads": 2, "initializer_range": 0.5}


@pytest.fixture(scope="module")
def tiny_llama() -> ReferenceModel:
    return make_tiny_llama()


def test_its_weights_are_the_same_bits_on_every_machine(tiny_llama: ReferenceModel) -> None:
    head = tiny_llama.network.state_dict()["lm_head.weight"]
    assert head[0, :3].tolist() == [0.30841630697250366, -0.4019117057323456, -0.27832576632499695]
    assert make_tiny_llama().weights == tiny_llama.weights


def test_its_tokenizer_begins_prompts_and_can_say_any_text(tiny_llama: ReferenceModel) -> None:
    encoded = tiny_llama.tokenizer.encode("Explain the significance of KV cache in language models.")
    assert encoded.ids[0] == 0
    assert len(encoded.ids) == 12
    strange = "\x00 \n naïve 漢字 \U0001f980"
    assert tiny_llama.tokenizer.decode(tiny_llama.tokenizer.encode(strange).ids) == strange


def test_a_model_from_a_folder_has_the_digest_of_its_content(tiny_llama: ReferenceModel, tmp_path: Path) -> None:
    folder = tmp_path / "some-llama"
    tiny_llama.network.save_pretrained(folder)
    tiny_llama.tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_model(folder)
    assert loaded.name == "some-llama"
    assert loaded.weights == tiny_llama.weights
    assert loaded.end_tokens == tiny_llama.end_tokens


def test_other_weights_have_another_digest(tiny_llama: ReferenceModel, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    tiny_llama.network.save_pretrained(folder)
    tiny_llama.tokenizer.save(str(folder / "tokenizer.json"))
    configuration = folder / "config.json"
    configuration.write_text(configuration.read_text().replace("10000.0", "20000.0"))
    assert load_model(folder).weights != tiny_llama.weights


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}, {"config.json": "no json"}], ids=["empty", "blank", "broken"])
def test_a_folder_without_a_model_is_refused(content: dict[str, str], tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="no model can be loaded"):
        load_model(tmp_path)


def saved(model: ReferenceModel, folder: Path) -> Path:
    model.network.save_pretrained(folder)
    model.tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_model_without_a_tokenizer_is_refused(tiny_llama: ReferenceModel, tmp_path: Path) -> None:
    (saved(tiny_llama, tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_model(tmp_path)


def test_a_tokenizer_that_is_none_is_refused(tiny_llama: ReferenceModel, tmp_path: Path) -> None:
    (saved(tiny_llama, tmp_path) / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="Model missing"):
        load_model(tmp_path)


def test_a_tokenizer_of_a_larger_model_is_refused(tiny_llama: ReferenceModel, tmp_path: Path) -> None:
    larger = Tokenizer.from_str(tiny_llama.tokenizer.to_str())
    larger.add_tokens(["one more"])
    larger.save(str(saved(tiny_llama, tmp_path) / "tokenizer.json"))
    with pytest.raises(ConfigError, match="its tokenizer has 961 tokens and the model 960"):
        load_model(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tiny_llama: ReferenceModel, tmp_path: Path) -> None:
    file = saved(tiny_llama, tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing, the first is model\.layers\.3\.mlp\.up_proj\.weight"):
        load_model(tmp_path)


def test_weights_that_end_early_are_refused(tiny_llama: ReferenceModel, tmp_path: Path) -> None:
    file = saved(tiny_llama, tmp_path) / "model.safetensors"
    os.truncate(file, 1_000_000)
    with pytest.raises(ConfigError, match="file not fully covered"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (BertConfig(**SIZES, num_hidden_layers=2, intermediate_size=32), "doesn't go on from a DynamicCache as a causal model"),
        (BloomConfig(**SIZES, n_layer=2), "names no max_position_embeddings"),
    ],
    ids=["bert", "bloom"],
)
def test_a_model_that_cannot_be_served_is_refused_by_name(
    tiny_llama: ReferenceModel, config: PreTrainedConfig, sentence: str, tmp_path: Path
) -> None:
    torch.manual_seed(12)
    network = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    saved(replace(tiny_llama, network=network), tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        load_model(tmp_path)


def test_the_tokens_that_end_an_answer_are_those_of_the_generation_config(tiny_llama: ReferenceModel, tmp_path: Path) -> None:
    saved(tiny_llama, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert load_model(tmp_path).end_tokens == {1, 7}

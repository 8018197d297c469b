"""The tiny Llama is the same everywhere, and a model from a folder is taken as it is."""

from pathlib import Path

import pytest

from p2pkv.engines.reference.model import ReferenceModel, load_model, make_tiny_llama
from p2pkv.errors import ConfigError


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


def test_a_model_without_a_tokenizer_is_refused(tiny_llama: ReferenceModel, tmp_path: Path) -> None:
    tiny_llama.network.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_model(tmp_path)

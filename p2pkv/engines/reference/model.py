"""The models that the reference engine runs: a tiny Llama made on the spot, or one from a folder.

The tiny one needs no download and no file but `page.txt`: its tokenizer is trained on that page, its weights are the output of
SHAKE-128, so they are the same bits on every machine and with every version of torch and transformers. It has no opinion of its
own; what it writes depends on every number that it reads, and that is what a cache is tested with.
"""

import hashlib
import json
import math
import textwrap
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from p2pkv.errors import ConfigError

TINY_LLAMA = "p2pkv/tiny-llama"
TINY_LLAMA_SEED = 83
"""Of 150 tried the one that answers the walk-through's prompt with the most words."""
TINY_LLAMA_STANDARD_DEVIATION = 0.3
"""Of the weights. Llama's own 0.02 makes random weights repeat one token for ever; with 0.3 greedy output varies."""
BEGIN, END = "<|begin|>", "<|end|>"
VOCABULARY_SIZE = 960
"""Nearly all words of `page.txt`; 256 are single bytes, so that any text can be said."""
MAX_REASON_NCHARS = 300
"""Of what transformers says of a folder; it may list all models that it knows."""
_MEANINGLESS_IN_CONFIG = frozenset({"transformers_version", "architectures", "_name_or_path"})
"""They differ between a model made here and the same model loaded from a folder."""


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """A model in memory, with what an engine has to know of it.

    Attributes:
        name: As users and the namespace say it.
        network: In evaluation mode, on the CPU, without gradients.
        tokenizer: Adds the tokens a prompt begins with, if the model wants any.
        weights: Digest of the weights and of the configuration: equal digests make equal KV.
        end_tokens: Token ids that end an answer.
    """

    name: str
    network: PreTrainedModel
    tokenizer: Tokenizer
    weights: str
    end_tokens: frozenset[int]

    @property
    def text_config(self) -> PreTrainedConfig:
        """The part of the configuration that the text decoder has; most have no other."""
        return self.network.config.get_text_config(decoder=True)

    @property
    def max_tokens(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return int(self.text_config.max_position_embeddings)

    @property
    def vocabulary_size(self) -> int:
        """Token ids are 0 ... this - 1."""
        return int(self.text_config.vocab_size)

    def compute(self, tokens: torch.Tensor, past: DynamicCache) -> torch.Tensor:
        """Run the model on.

        Args:
            tokens: `[1, count]`, those that follow what `past` holds.
            past: Their keys and values are appended to it.

        Returns:
            Logits `[vocabulary]` after the last of `tokens`.
        """
        result = self.network(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = result.logits[0, -1]
        return logits


def make_tiny_llama() -> ReferenceModel:
    """Make the tiny Llama: 4 layers, 2.9 million float32 weights, 4,096 tokens. Takes 0.2 s."""
    tokenizer = _train_tokenizer(resources.files(__package__).joinpath("page.txt").read_text("utf-8"))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        dtype=torch.float32,
    )
    network = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]  # its constructor has no annotations
    network.load_state_dict({name: _tiny_weight(name, like.shape) for name, like in network.state_dict().items()})
    return _reference_model(TINY_LLAMA, network, tokenizer)


def save_tiny_llama(directory: Path) -> None:
    """Save the tiny Llama as other engines load it: 12 MB, in Hugging Face's form."""
    model = make_tiny_llama()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.network.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=model.tokenizer, bos_token=BEGIN, eos_token=END
    )
    tokenizer.save_pretrained(directory)


def load_model(directory: Path) -> ReferenceModel:
    """Load a causal language model that was saved by Hugging Face's `save_pretrained`; nothing is downloaded.

    Args:
        directory: Holds the configuration, the weights as safetensors, and `tokenizer.json`.

    Raises:
        ConfigError: The folder doesn't hold such a model, or not all of it; the text says what is wrong.
    """
    try:
        network = _load_network(directory)
        tokenizer = _load_tokenizer(directory)
        model = _reference_model(directory.resolve().name, network, tokenizer)
        _check_fit(model)
        _check_passes(model)
    except Exception as error:  # whatever transformers makes of files that are somebody else's
        reason = textwrap.shorten(str(error), MAX_REASON_NCHARS)
        raise ConfigError(f"no model can be loaded from {directory}: {reason}") from error
    return model


def _load_network(directory: Path) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True
    )
    network, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    assert isinstance(network, PreTrainedModel)
    return network


def _load_tokenizer(directory: Path) -> Tokenizer:
    vocabulary = directory / "tokenizer.json"
    if not vocabulary.is_file():
        raise ConfigError("it has no tokenizer.json")
    return Tokenizer.from_file(str(vocabulary))


def _reference_model(name: str, network: PreTrainedModel, tokenizer: Tokenizer) -> ReferenceModel:
    network.train(mode=False).requires_grad_(requires_grad=False)
    end = network.generation_config.eos_token_id
    ends = frozenset(end) if isinstance(end, list) else frozenset() if end is None else frozenset({end})
    return ReferenceModel(name, network, tokenizer, _weights_digest(network), ends)


def _check_fit(model: ReferenceModel) -> None:
    """Refuse a tokenizer of another model, and a model that doesn't say how much it reads."""
    tokens = model.tokenizer.get_vocab_size()
    if tokens > model.vocabulary_size:
        raise ConfigError(f"its tokenizer has {tokens} tokens and the model {model.vocabulary_size}")
    if getattr(model.text_config, "max_position_embeddings", None) is None:
        raise ConfigError("its configuration names no max_position_embeddings, so nothing says how long a prompt may be")


def _check_passes(model: ReferenceModel) -> None:
    """Refuse a model that reads on from a `DynamicCache` otherwise than it reads at once: the engine does nothing else."""
    tokens = torch.tensor([[0, 1, 2, 3]]) % model.vocabulary_size
    with torch.inference_mode():
        whole = model.compute(tokens, DynamicCache(config=model.network.config))
        past = DynamicCache(config=model.network.config)
        model.compute(tokens[:, :2], past)
        in_parts = model.compute(tokens[:, 2:], past)
    rounding = torch.finfo(whole.dtype).eps ** 0.5  # half the digits: 1,000 times what a small model's sums differ by
    tolerance = rounding * float(whole.abs().max())
    if past.get_seq_length() != 4 or not torch.allclose(whole, in_parts, rtol=0.0, atol=tolerance):
        raise ConfigError(f"{type(model.network).__name__} doesn't go on from a DynamicCache as a causal model should")


def _train_tokenizer(page: str) -> Tokenizer:
    """A byte-level BPE tokenizer that puts `BEGIN` before each prompt, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([page], trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    return tokenizer


def _tiny_weight(name: str, shape: torch.Size) -> torch.Tensor:
    """The weight called `name`: uniform around 0 with the standard deviation above; ones for the norms, the only vectors."""
    if len(shape) == 1:
        return torch.ones(shape)
    noise = hashlib.shake_128(f"{TINY_LLAMA}:{TINY_LLAMA_SEED}:{name}".encode()).digest(4 * math.prod(shape))
    integers = torch.frombuffer(bytearray(noise), dtype=torch.int32).reshape(shape)
    half_width = TINY_LLAMA_STANDARD_DEVIATION * math.sqrt(3)
    return integers.to(torch.float32) * (half_width / 2**31)


def _weights_digest(network: PreTrainedModel) -> str:
    """32 hex digits for all that the KV cache of a prompt depends on."""
    unusual = {name: value for name, value in network.config.to_diff_dict().items() if name not in _MEANINGLESS_IN_CONFIG}
    digest = xxhash.xxh3_128(json.dumps(unusual, sort_keys=True, default=str).encode())
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

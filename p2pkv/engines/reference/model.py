"""The models that the reference engine runs: a tiny Llama made on the spot, or one from a folder.

The tiny one needs no download and no file but `page.txt`: its tokenizer is trained on that page, its weights are the output of
SHAKE-128, so they are the same bits on every machine and with every version of torch and transformers. It has no opinion of its
own; what it writes depends on every number that it reads, and that is what a cache is tested with.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from p2pkv.errors import ConfigError

TINY_LLAMA = "p2pkv/tiny-llama"
TINY_LLAMA_SEED = 83
"""Of 150 tried the one that answers the walk-through's prompt with the most words."""
TINY_LLAMA_STANDARD_DEVIATION = 0.3
"""Of the weights. Llama's own 0.02 makes random weights repeat one token for ever; with 0.3 greedy output varies."""
BEGIN, END = "<|begin|>", "<|end|>"
VOCABULARY_SIZE = 960
"""Nearly all words of `page.txt`; 256 are single bytes, so that any text can be said."""
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
    def max_tokens(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return int(self.network.config.max_position_embeddings)

    @property
    def vocabulary_size(self) -> int:
        """Token ids are 0 ... this - 1."""
        return int(self.network.config.vocab_size)


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


def load_model(directory: Path) -> ReferenceModel:
    """Load a causal language model that was saved by Hugging Face's `save_pretrained`; nothing is downloaded.

    Args:
        directory: Holds the configuration, the weights as safetensors, and `tokenizer.json`.

    Raises:
        ConfigError: The folder doesn't hold such a model.
    """
    try:
        network = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, use_safetensors=True, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model can be loaded from {directory}: {error}") from error
    vocabulary = directory / "tokenizer.json"
    if not vocabulary.is_file():
        raise ConfigError(f"no model can be loaded from {directory}: it has no tokenizer.json")
    return _reference_model(directory.resolve().name, network, Tokenizer.from_file(str(vocabulary)))


def _reference_model(name: str, network: PreTrainedModel, tokenizer: Tokenizer) -> ReferenceModel:
    network.train(mode=False).requires_grad_(requires_grad=False)
    end = network.config.eos_token_id
    ends = frozenset(end) if isinstance(end, list) else frozenset() if end is None else frozenset({end})
    return ReferenceModel(name, network, tokenizer, _weights_digest(network), ends)


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
        digest.update(weight.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()

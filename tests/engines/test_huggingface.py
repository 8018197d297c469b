"""A DynamicCache becomes the canonical tensor and back without a changed bit; what can't be expressed is refused by name."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3nTextConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    StaticCache,
    T5Config,
)
from transformers.cache_utils import QuantoQuantizedLayer

from p2pkv.engines import KVLayout
from p2pkv.engines.huggingface import Refusal, cache_of_kv, kv_of_cache, layout_of
from p2pkv.errors import UnsupportedCacheError

LAYOUT = KVLayout(layers=3, kv_heads=2, head_dim=4, dtype="float32")


def filled_cache(token_count: int, *, batch: int = 1, layers: int = 3, dtype: torch.dtype = torch.float32) -> DynamicCache:
    planes = torch.arange(layers * 2 * batch * 2 * token_count * 4, dtype=dtype).view(layers, 2, batch, 2, token_count, 4)
    return DynamicCache([(keys, values) for keys, values in planes])


def test_the_tensor_is_layers_planes_tokens_heads_elements() -> None:
    cache = filled_cache(5)
    kv = kv_of_cache(cache, LAYOUT, 5)
    assert kv.shape == LAYOUT.shape(5)
    assert kv.is_contiguous()
    _, (keys, values, _), _ = cache
    assert torch.equal(kv[1, 0, 4, 1], keys[0, 1, 4])
    assert torch.equal(kv[1, 1, 2, 0], values[0, 0, 2])


@pytest.mark.parametrize("token_count", [1, 2, 7])
def test_there_and_back_changes_nothing(token_count: int) -> None:
    kv = torch.randn(LAYOUT.shape(token_count), generator=torch.Generator().manual_seed(1))
    assert torch.equal(kv_of_cache(cache_of_kv(kv), LAYOUT, token_count), kv)


def test_only_the_tokens_asked_for_are_taken() -> None:
    kv = kv_of_cache(filled_cache(7), LAYOUT, 7)
    assert torch.equal(kv_of_cache(filled_cache(7), LAYOUT, 3), kv[:, :, :3])


def test_the_tensor_is_a_copy() -> None:
    cache = filled_cache(2)
    kv = kv_of_cache(cache, LAYOUT, 2)
    before = kv.clone()
    for layer in cache.layers:
        layer.reset()
    assert torch.equal(kv, before)


def test_a_model_s_layout_is_read_from_its_configuration() -> None:
    llama = LlamaConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=4, dtype=torch.bfloat16)
    assert layout_of(llama) == KVLayout(layers=3, kv_heads=2, head_dim=4, dtype="bfloat16")
    assert layout_of(GPT2Config(n_layer=2, n_head=4, n_embd=32, dtype=torch.float32)) == KVLayout(
        layers=2, kv_heads=4, head_dim=8, dtype="float32"
    )
    assert layout_of(MistralConfig(sliding_window=None, dtype=torch.float16)).dtype == "float16"


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        (T5Config(), Refusal.ENCODER_DECODER),
        (DeepseekV3Config(), Refusal.LATENT_ATTENTION),
        (MistralConfig(sliding_window=128), Refusal.SLIDING_WINDOW),
        (JambaConfig(), Refusal.HYBRID),
        (Gemma3nTextConfig(layer_types=["full_attention"] * 35), Refusal.SHARED_LAYERS),
        (LlamaConfig(), Refusal.OTHER_LAYOUT),
    ],
    ids=lambda value: str(value) if isinstance(value, Refusal) else "",
)
def test_a_model_whose_cache_cannot_be_expressed_is_refused_by_name(config: PreTrainedConfig, refusal: Refusal) -> None:
    with pytest.raises(UnsupportedCacheError, match=refusal) as refused:
        layout_of(config)
    assert refused.value.reason == refusal


def quantised_cache() -> DynamicCache:
    cache = filled_cache(2)
    cache.layers[1] = QuantoQuantizedLayer.__new__(QuantoQuantizedLayer)  # quanto itself isn't installed
    return cache


@pytest.mark.parametrize(
    ("cache", "refusal"),
    [
        (filled_cache(2, batch=2), Refusal.BATCH),
        (quantised_cache(), Refusal.QUANTISED),
        (DynamicCache(config=MistralConfig(sliding_window=8)), Refusal.SLIDING_WINDOW),
        (DynamicCache(config=JambaConfig()), Refusal.HYBRID),
        (StaticCache(config=LlamaConfig(), max_cache_len=8), Refusal.FOREIGN_CACHE),
        (EncoderDecoderCache(filled_cache(2), filled_cache(2)), Refusal.FOREIGN_CACHE),
        (DynamicCache(), Refusal.OTHER_LAYOUT),
        (filled_cache(1), Refusal.OTHER_LAYOUT),
        (filled_cache(2, layers=2), Refusal.OTHER_LAYOUT),
        (filled_cache(2, dtype=torch.float16), Refusal.OTHER_LAYOUT),
    ],
)
def test_a_cache_that_cannot_be_expressed_is_refused_by_name(cache: DynamicCache, refusal: Refusal) -> None:
    with pytest.raises(UnsupportedCacheError) as refused:
        kv_of_cache(cache, LAYOUT, 2)
    assert refused.value.reason == refusal

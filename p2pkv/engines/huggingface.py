"""Hugging Face's `DynamicCache` to the canonical KV tensor and back.

The canonical tensor is `[layers, 2, tokens, kv_heads, head_dim]`, keys before values, keys after the rotary embedding, which is
how a `DynamicCache` holds them too. What can't be said in it is refused with an `UnsupportedCacheError` that names a `Refusal`:
the engine then bypasses the cache instead of reading wrong numbers.
"""

from enum import StrEnum

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, QuantizedLayer

from p2pkv.engines import KVLayout
from p2pkv.errors import UnsupportedCacheError


class Refusal(StrEnum):
    """Why a cache can't be expressed."""

    ENCODER_DECODER = "encoder_decoder"
    LATENT_ATTENTION = "latent_attention"
    SLIDING_WINDOW = "sliding_window"
    HYBRID = "hybrid"
    QUANTISED = "quantised"
    SHARED_LAYERS = "shared_layers"
    BATCH = "batch"
    FOREIGN_CACHE = "foreign_cache"
    OTHER_LAYOUT = "other_layout"


def layout_of(config: PreTrainedConfig) -> KVLayout:
    """The layout of the KV cache that a model with `config` fills.

    Args:
        config: Of the whole model; of one with pictures or sound, the text decoder's part counts. Must name its dtype.

    Raises:
        UnsupportedCacheError: Such a cache can't be expressed; no engine should attach.
    """
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise UnsupportedCacheError(Refusal.ENCODER_DECODER, "the cross-attention cache depends on the encoder's input")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedCacheError(Refusal.LATENT_ATTENTION, "keys and values of MLA have different sizes in a DynamicCache")
    layers = _plain_layers(DynamicCache(config=config))
    if len(layers) != text.num_hidden_layers:
        raise UnsupportedCacheError(
            Refusal.SHARED_LAYERS, f"{text.num_hidden_layers} layers share the keys and values of {len(layers)}"
        )
    if text.dtype is None:
        raise UnsupportedCacheError(Refusal.OTHER_LAYOUT, "the model's configuration names no dtype")
    heads = text.num_attention_heads
    return KVLayout(
        layers=len(layers),
        planes=2,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype=_dtype_name(text.dtype),
    )


def kv_of_cache(cache: Cache, layout: KVLayout, token_count: int) -> torch.Tensor:
    """The KV of the first `token_count` tokens of `cache`.

    Args:
        cache: Of one sequence without padding, filled by a model of `layout`; not changed.
        layout: As `layout_of` gave it.
        token_count: At least 1, at most what `cache` holds.

    Returns:
        A copy, `[layers, 2, token_count, kv_heads, head_dim]`, C order, on the cache's device; the caller's.

    Raises:
        UnsupportedCacheError: `cache` isn't what `layout` says. An engine computes on without storing.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        raise UnsupportedCacheError(Refusal.FOREIGN_CACHE, f"{type(cache).__name__} isn't a plain DynamicCache on one device")
    layers = _plain_layers(cache)
    if len(layers) != layout.layers:
        raise UnsupportedCacheError(Refusal.OTHER_LAYOUT, f"it has {len(layers)} layers instead of {layout.layers}")
    planes = [_tokens_first(plane, layout, token_count) for layer in layers for plane in (layer.keys, layer.values)]
    return torch.stack(planes).view(layout.layers, 2, *planes[0].shape)


def cache_of_kv(kv: torch.Tensor) -> DynamicCache:
    """A `DynamicCache` of one sequence that begins with the tokens of `kv`.

    Args:
        kv: `[layers, 2, tokens, kv_heads, head_dim]`, on the model's device and of its dtype; only read, and copied.
    """
    by_head = kv.transpose(2, 3).unsqueeze(2)
    return DynamicCache([(keys, values) for keys, values in by_head])


def _plain_layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers, if each is a `DynamicLayer` and none of its subclasses, which keep other things or forget tokens."""
    plain = []
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            plain.append(layer)
        elif isinstance(layer, LinearAttentionCacheLayerMixin):
            raise UnsupportedCacheError(Refusal.HYBRID, "a layer keeps a running state instead of keys and values")
        elif isinstance(layer, QuantizedLayer):
            raise UnsupportedCacheError(Refusal.QUANTISED, "a layer keeps its keys and values quantised")
        elif getattr(layer, "is_sliding", False):
            raise UnsupportedCacheError(Refusal.SLIDING_WINDOW, "a layer forgets the tokens outside its window")
        else:
            raise UnsupportedCacheError(Refusal.FOREIGN_CACHE, f"a layer is a {type(layer).__name__}")
    return plain


def _tokens_first(plane: torch.Tensor | None, layout: KVLayout, token_count: int) -> torch.Tensor:
    """A view `[token_count, kv_heads, head_dim]` of a layer's `[1, kv_heads, tokens, head_dim]`, once that fits `layout`."""
    if plane is None or plane.dim() != 4:
        raise UnsupportedCacheError(Refusal.OTHER_LAYOUT, "a layer holds nothing yet")
    batch, heads, tokens, head_dim = plane.shape
    if batch != 1:
        raise UnsupportedCacheError(Refusal.BATCH, f"{batch} sequences share it; give each a cache of its own")
    if (heads, head_dim, _dtype_name(plane.dtype)) != (layout.kv_heads, layout.head_dim, layout.dtype) or tokens < token_count:
        raise UnsupportedCacheError(
            Refusal.OTHER_LAYOUT, f"{tuple(plane.shape)} {plane.dtype} doesn't hold {token_count} tokens of {layout}"
        )
    return plane[0, :, :token_count].transpose(0, 1)


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")

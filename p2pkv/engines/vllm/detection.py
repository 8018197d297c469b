"""What vLLM registered, as a layout that has been proved; the only place that reads vLLM's own objects for it.

Written from vLLM 0.32: vllm/v1/kv_cache_interface.py, vllm/v1/worker/gpu_model_runner.py (`initialize_kv_cache`),
vllm/model_executor/layers/attention/{attention,mla_attention}.py.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from p2pkv.engines.vllm.layout import CacheFacts, PagedLayout, Refusal, UnsupportedLayoutError, paged_layout
from p2pkv.engines.vllm.proof import Write, prove

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

FULL_ATTENTION = ("FullAttentionSpec", "MLAAttentionSpec")
"""The kinds of cache that keep each token's own state, for as long as its request lives."""


def detect(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", kv_caches: Mapping[str, torch.Tensor]) -> PagedLayout:
    """The layout of what vLLM gives to `register_kv_caches`, proved by vLLM's own operation.

    Args:
        vllm_config: The engine's.
        kv_cache_config: The engine's.
        kv_caches: A tensor for each layer's name. Nothing may be scheduled yet; every byte is afterwards as it was.

    Raises:
        UnsupportedLayoutError: It can't be used; its reason says why.
    """
    try:
        return _detect(vllm_config, kv_cache_config, kv_caches)
    except UnsupportedLayoutError:
        raise
    except Exception as error:  # objects and operations are vLLM's own, and no version of it promises them
        raise UnsupportedLayoutError(Refusal.UNEXPECTED, f"this vLLM isn't as expected: {error!r}") from error


def _detect(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", kv_caches: Mapping[str, torch.Tensor]) -> PagedLayout:
    _check_parallelism(vllm_config)
    spec = _only_spec(kv_cache_config)
    names = _in_order(kv_caches)
    if len(names) != vllm_config.model_config.get_num_layers(vllm_config.parallel_config):
        raise UnsupportedLayoutError(Refusal.OTHER_LAYERS, f"{len(names)} layers have a cache, the model has more or fewer")
    layers = [vllm_config.compilation_config.static_forward_context[name] for name in names]
    backends = sorted({layer.get_attn_backend().get_name() for layer in layers})
    isas = {getattr(layer, "isa", None) for layer in layers}
    if len(backends) > 1 or len(isas) > 1:
        raise UnsupportedLayoutError(Refusal.LAYERS_DIFFER, f"layers use {', '.join(backends)} for {isas}")
    if spec.dtype != vllm_config.model_config.dtype:
        detail = f"keys and values of {vllm_config.model_config.dtype} are kept as {spec.dtype}"
        raise UnsupportedLayoutError(Refusal.QUANTISED, detail)
    facts = CacheFacts(
        backend=backends[0],
        isa=isas.pop(),
        block_size=spec.block_size,
        block_count=kv_cache_config.num_blocks,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        dtype=spec.dtype,
    )
    paged = paged_layout(facts, [kv_caches[name] for name in names])
    prove(paged, writing_latents(layers) if paged.layout.planes == 1 else writing(layers))
    return paged


def _check_parallelism(vllm_config: "VllmConfig") -> None:
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedLayoutError(Refusal.PIPELINE_PARALLEL, "each stage has only some of the layers")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedLayoutError(Refusal.CONTEXT_PARALLEL, "each worker has only some of the tokens")


def _only_spec(kv_cache_config: "KVCacheConfig") -> Any:
    """What vLLM says of every layer's cache, if it says the same of all and keeps it plainly."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedLayoutError(Refusal.SEVERAL_GROUPS, f"there are {len(groups)} groups of KV caches")
    spec: Any = groups[0].kv_cache_spec
    kind = type(spec).__name__
    if kind == "UniformTypeKVCacheSpecs":
        raise UnsupportedLayoutError(Refusal.LAYERS_DIFFER, "layers have caches of different shapes")
    if kind.startswith("SlidingWindow") or getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None):
        raise UnsupportedLayoutError(Refusal.SLIDING_WINDOW, "a layer looks at some of the tokens only")
    if kind not in FULL_ATTENTION:
        raise UnsupportedLayoutError(Refusal.BACKEND, f"what a {kind} describes isn't known")
    if spec.kv_quant_mode != 0:
        raise UnsupportedLayoutError(Refusal.QUANTISED, f"the KV cache is quantised: {spec.kv_quant_mode!r}")
    if kind == "FullAttentionSpec" and spec.head_size_v != spec.head_size:
        raise UnsupportedLayoutError(Refusal.SHAPE, f"keys have {spec.head_size} elements, values {spec.head_size_v}")
    if spec.num_head_slots is not None or spec.state_content_bytes is not None or spec.tokens_per_state != 1:
        raise UnsupportedLayoutError(Refusal.PACKED, "the backend packs its cache in its own way")
    return spec


def _in_order(kv_caches: Mapping[str, torch.Tensor]) -> list[str]:
    """The layers' names in the model's order, by the number in each, as in `model.layers.0.self_attn.attn`."""
    by_number: dict[int, str] = {}
    for name in kv_caches:
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if len(numbers) != 1 or numbers[0] in by_number:
            raise UnsupportedLayoutError(Refusal.OTHER_LAYERS, f"{name} doesn't say which layer it is of, or isn't alone there")
        by_number[numbers[0]] = name
    return [by_number[number] for number in sorted(by_number)]


def writing(layers: list[Any]) -> Write:
    """How `layers` of vLLM write: vllm/model_executor/layers/attention/attention.py, `unified_kv_cache_update`."""

    def write(number: int, kv: torch.Tensor, slots: torch.Tensor) -> None:
        layer = layers[number]
        layer.impl.do_kv_cache_update(layer, kv[0].contiguous(), kv[1].contiguous(), layer.kv_cache, slots)

    return write


def writing_latents(layers: list[Any]) -> Write:
    """How `layers` of MLA write: vllm/model_executor/layers/attention/mla_attention.py, `unified_mla_kv_cache_update`."""

    def write(number: int, kv: torch.Tensor, slots: torch.Tensor) -> None:
        layer = layers[number]
        latent, rotary = kv[0, :, :, : layer.kv_lora_rank], kv[0, :, :, layer.kv_lora_rank :]  # of [tokens, 1 head, ...]
        scale = layer._k_scale  # noqa: SLF001 - the layer hands it on under this name; not quantised, it does nothing
        layer.impl.do_kv_cache_update(
            latent[:, 0].contiguous(), rotary.contiguous(), layer.kv_cache, slots, layer.kv_cache_dtype, scale
        )

    return write

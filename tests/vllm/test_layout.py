"""Our layouts against vLLM's own operations and objects."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from p2pkv.engines.huggingface import kv_of_cache, layout_of
from p2pkv.engines.reference.model import load_model
from p2pkv.engines.vllm.detection import detect, writing_latents
from p2pkv.engines.vllm.layout import CacheFacts, PagedLayout, Refusal, UnsupportedLayoutError, paged_layout
from p2pkv.engines.vllm.proof import prove

BLOCKS, HEADS = 5, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpu_operation(caches: list[torch.Tensor], isa: str) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
    """What CPU_ATTN calls to write, as in its `do_kv_cache_update`."""
    from vllm import _custom_ops

    def write(layer: int, kv: torch.Tensor, slots: torch.Tensor) -> None:
        blocks, heads, tokens, _ = caches[layer].shape
        keys, values = caches[layer].view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)
        _custom_ops.cpu_attn_reshape_and_cache(kv[0].contiguous(), kv[1].contiguous(), keys, values, slots, isa)

    return write


def cpu_layout(isa: str, head_dim: int, block_size: int, dtype: torch.dtype) -> PagedLayout:
    caches = [torch.zeros(BLOCKS, HEADS, block_size, 2 * head_dim, dtype=dtype) for _ in range(2)]
    return paged_layout(CacheFacts("CPU_ATTN", isa, block_size, BLOCKS, HEADS, head_dim, dtype), caches)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("isa", "head_dim", "block_size"),
    [("vec", 32, 32), ("vec", 64, 32), ("vec", 128, 128), ("vec", 256, 96), ("vec16", 80, 32), ("vec16", 112, 16)],
)
def test_the_cpu_layout_is_where_vllms_operation_writes(isa: str, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    paged = cpu_layout(isa, head_dim, block_size, dtype)
    prove(paged, cpu_operation(list(paged.caches), isa))
    kv = torch.randn(paged.layout.shape(3 * block_size)).to(dtype)
    slots = paged.slots([4, 0, 2], 0, 3 * block_size)
    for layer, planes in enumerate(kv):
        cpu_operation(list(paged.caches), isa)(layer, planes, slots)
    assert torch.equal(paged.gather([4, 0, 2], 1, 3 * block_size - 1), kv[:, :, 1:-1])


def test_the_latent_layout_is_where_vllms_operation_writes() -> None:
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

    caches = [torch.zeros(BLOCKS, 1, 32, 64 + 16, dtype=torch.bfloat16) for _ in range(2)]
    paged = paged_layout(CacheFacts("CPU_MLA", None, 32, BLOCKS, 1, 64 + 16, torch.bfloat16), caches)
    layers = [
        SimpleNamespace(
            impl=object.__new__(CPUMLAImpl),  # writing needs nothing that its constructor sets
            kv_cache=cache.squeeze(1),
            kv_lora_rank=64,
            kv_cache_dtype="auto",
            _k_scale=torch.ones(1),
        )
        for cache in caches
    ]
    prove(paged, writing_latents(layers))


# --- a whole engine -------------------------------------------------------------------------------------------------------


def registered(llm: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """What vLLM gives a connector: its configuration, its caches' configuration, and the caches."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context
    return runner.vllm_config, runner.kv_cache_config, {name: layer.kv_cache for name, layer in layers.items()}


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "block_size": 128}], ids=["float32", "bfloat16"])
def test_an_engines_caches_hold_what_hugging_face_computes(
    llm: Callable[..., Any], tiny_model: Path, options: dict[str, Any]
) -> None:
    from vllm import SamplingParams

    engine = llm(**options)
    paged = detect(*registered(engine))
    prompt = [0, *range(100, 250)]
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (answer,) = engine.generate({"prompt_token_ids": prompt}, greedy)
    model = load_model(tiny_model)
    network: Any = model.network
    network.to(paged.layout.torch_dtype)
    layout = layout_of(network.config)
    assert paged.layout == replace(layout, dtype=paged.layout.dtype)

    tokens = prompt + list(answer.outputs[0].token_ids)[:-1]
    with torch.inference_mode():
        cache = network(input_ids=torch.tensor([tokens]), use_cache=True).past_key_values
    expected = kv_of_cache(cache, paged.layout, len(tokens))
    first_request = list(range(1, 2 + len(tokens) // paged.block_size))  # the first that a new engine gives out
    found = paged.gather(first_request, 0, len(tokens))
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    assert difference < (1e-4 if paged.layout.dtype == "float32" else 0.2)  # each rounds in its own order

    detect(*registered(engine))
    (again,) = engine.generate({"prompt_token_ids": prompt}, greedy)
    assert again.outputs[0].token_ids == answer.outputs[0].token_ids


def test_an_engine_that_is_not_as_expected_is_refused(llm: Callable[..., Any]) -> None:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    config, caches_config, caches = registered(llm())
    group = caches_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    window = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=spec.dtype, sliding_window=128)
    cases: list[tuple[Refusal, Any, dict[str, torch.Tensor]]] = [
        (Refusal.SEVERAL_GROUPS, [group, group], caches),
        (Refusal.SLIDING_WINDOW, [replace(group, kv_cache_spec=window)], caches),
        (Refusal.SLIDING_WINDOW, [replace(group, kv_cache_spec=replace(spec, sliding_window=128))], caches),
        (Refusal.QUANTISED, [replace(group, kv_cache_spec=replace(spec, dtype=torch.uint8))], caches),
        (Refusal.QUANTISED, [replace(group, kv_cache_spec=replace(spec, kv_quant_mode=type(spec.kv_quant_mode)(1)))], caches),
        (Refusal.PACKED, [replace(group, kv_cache_spec=replace(spec, num_head_slots=4))], caches),
        (Refusal.SHAPE, [replace(group, kv_cache_spec=replace(spec, head_size_v=32))], caches),
        (Refusal.OTHER_LAYERS, [group], dict(list(caches.items())[:-1])),
        (Refusal.OTHER_LAYERS, [group], caches | {"model.draft.0.attn": next(iter(caches.values()))}),
    ]
    for reason, groups, registered_caches in cases:
        with pytest.raises(UnsupportedLayoutError) as refused:
            detect(config, replace(caches_config, kv_cache_groups=groups), registered_caches)
        assert refused.value.reason == reason

    layer = config.compilation_config.static_forward_context[next(iter(caches))]
    for isa, reason in [("amx", Refusal.LAYERS_DIFFER), ("vec16", Refusal.LAYERS_DIFFER)]:
        known, layer.isa = layer.isa, isa
        with pytest.raises(UnsupportedLayoutError) as refused:
            detect(config, caches_config, caches)
        layer.isa = known
        assert refused.value.reason == reason
    bound, layer.kv_cache = layer.kv_cache, torch.zeros_like(layer.kv_cache)
    with pytest.raises(UnsupportedLayoutError) as refused:
        detect(config, caches_config, caches)
    layer.kv_cache = bound
    assert refused.value.reason == Refusal.MISMATCH
    detect(config, caches_config, caches)

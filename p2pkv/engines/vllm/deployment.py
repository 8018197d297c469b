"""What vLLM's configuration says of the KV cache: whether it can be kept at all, and under which model's name."""

import hashlib
import json
from enum import StrEnum
from typing import Any

from p2pkv.errors import UnsupportedCacheError

MODEL_MAX_LENGTH = 512
"""As `core.keys.Namespace` has it."""


class Refusal(StrEnum):
    """Why a deployment goes without the cache."""

    CONFIG = "config"
    DRAFT_KV = "draft_kv"
    POOLING = "pooling"
    MODEL_OVERRIDES = "model_overrides"
    LOAD_FAILURE_POLICY = "load_failure_policy"


def check_deployment(config: Any) -> None:
    """See whether vLLM's configuration is one that the connector can serve; what its caches look like is told by `detection`.

    Args:
        config: A `VllmConfig`.

    Raises:
        UnsupportedCacheError: It isn't; the reason is one of `Refusal`.
    """
    if config.speculative_config is not None and config.speculative_config.uses_draft_kv_cache():
        raise UnsupportedCacheError(Refusal.DRAFT_KV, "the draft model's KV can't be kept beside the model's")
    if config.model_config.runner_type == "pooling":
        raise UnsupportedCacheError(Refusal.POOLING, "a pooling model computes each prompt anew")


def model_name(config: Any, chosen: str | None) -> str:
    """The name under which this model's chunks are kept.

    It is vLLM's name of the model, followed by a digest of what else was configured that changes its KV, if anything was.

    Args:
        config: A `VllmConfig`.
        chosen: The operator's name for it, which then is the name.

    Raises:
        UnsupportedCacheError: What was configured can't be told from something else.
    """
    if chosen is not None:
        return chosen
    model, load = config.model_config, config.load_config
    overrides = model.hf_overrides
    if callable(overrides):
        detail = "hf_overrides is a function; name what comes of it with p2pkv.model in kv_connector_extra_config"
        raise UnsupportedCacheError(Refusal.MODEL_OVERRIDES, detail)
    changes = {
        "revision": model.revision,
        "code_revision": model.code_revision,
        "quantization": model.quantization,
        "hf_overrides": overrides,
        "rope_length": model.max_model_len if _is_rope_of_length(model.hf_text_config) else None,
        "dummy_weights": model.seed if load.load_format == "dummy" else None,
        "compute_dtype": None if config.cache_config.cache_dtype == "auto" else str(model.dtype),
    }
    given = {name: value for name, value in changes.items() if value not in (None, {}, "")}
    suffix = f"#{hashlib.sha256(json.dumps(given, sort_keys=True, default=repr).encode()).hexdigest()[:16]}" if given else ""
    name = str(model.model)
    if len(name) + len(suffix) > MODEL_MAX_LENGTH:
        name = hashlib.sha256(name.encode()).hexdigest()
    return name + suffix


def _is_rope_of_length(config: Any) -> bool:
    """Whether the rotary embedding depends on the longest context that vLLM was started for."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return kind not in {"default", "linear", "llama3", "yarn", "mrope"}

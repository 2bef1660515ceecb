"""transformers' attention with this package's own on the CPU: `attn_implementation="dbllm"`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dbllm_cli.kernels import (
    attend_causal,
    attend_one,
    can_attend_causal,
    can_attend_one,
    cpu_kernels,
)

NAME = "dbllm"
_DEFAULT = "sdpa"
_ONLY_SDPA = ("position_bias", "softcap", "cache", "s_aux")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' sdpa attention; what this package does faster goes to its own."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    special = dropout != 0 or any(kwargs.get(name) is not None for name in _ONLY_SDPA)
    if not special and can_attend_one(query, key, value, attention_mask):
        return attend_one(query, key, value, attention_mask, scale), None
    causal = not special and attention_mask is None and _is_causal(module, kwargs)
    if causal and can_attend_causal(query, key, value):
        return attend_causal(query, key, value, scale), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


def _is_causal(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """As transformers' sdpa attention reads it where there is no mask."""
    said = arguments.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


# A model that was pickled needs them before anything is called.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Give a model with sdpa, transformers' default attention, the kernel where there is one."""
    if cpu_kernels() is None or model.config._attn_implementation != _DEFAULT:  # noqa: SLF001
        return
    model.set_attn_implementation(NAME)

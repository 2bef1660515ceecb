"""transformers' attention with the CPU kernel for decoded tokens: `attn_implementation="dbllm"`."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dbllm_cli.kernels import attend_one, can_attend_one, cpu_kernels

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
    """Transformers' sdpa attention; what `can_attend_one` lets through goes to the kernel."""
    special = dropout != 0 or any(kwargs.get(name) is not None for name in _ONLY_SDPA)
    if special or not can_attend_one(query, key, value, attention_mask):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_one(query, key, value, attention_mask, scale), None


# A model that was pickled needs them before anything is called.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Give a model with sdpa, transformers' default attention, the kernel where there is one."""
    if cpu_kernels() is None or model.config._attn_implementation != _DEFAULT:  # noqa: SLF001
        return
    model.set_attn_implementation(NAME)

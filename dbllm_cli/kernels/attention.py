"""Attention of one query a sequence, as decoding with a cache needs it, on the CPU.

torch's own flash attention makes tiles of one row of it, and takes ten times as long.
"""

import torch
from torch import Tensor

from dbllm_cli.kernels.cpu import cpu_kernels

_DTYPES = (torch.float32, torch.bfloat16)
_LARGEST_HEAD = 512
_MOST_SHARED = 64


def can_attend_one(query: Tensor, key: Tensor, value: Tensor, mask: object) -> bool:
    """Whether `attend_one` takes these; scaled_dot_product_attention takes all."""
    batch, heads, queries, dim = query.shape
    return (
        queries == 1
        and batch > 0
        and query.device.type == "cpu"
        and query.dtype in _DTYPES
        and key.dtype == value.dtype == query.dtype
        and key.shape == value.shape
        and key.shape[0] == batch
        and key.shape[-1] == dim <= _LARGEST_HEAD
        and key.stride(-1) == value.stride(-1) == 1
        and key.shape[2] > 0
        and heads % key.shape[1] == 0
        and heads <= _MOST_SHARED * key.shape[1]
        and _hides_positions(mask, batch, key.shape[2])
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
        and cpu_kernels() is not None
    )


def _hides_positions(mask: object, batch: int, positions: int) -> bool:
    """A mask of whole positions, the same for every head, or none."""
    if mask is None:
        return True
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.shape
        in {
            (batch, 1, 1, positions),
            (1, 1, 1, positions),
        }
    )


def attend_one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """`softmax(scale · query keyᵀ) value`, for what `can_attend_one` lets through.

    Sums and weights are float32. A sequence with every position hidden gives zeros, as
    scaled_dot_product_attention does.

    Args:
        query: float32 or bfloat16 `[batch, heads, 1, dim]` on the CPU.
        key: `[batch, key heads, positions, dim]`; each is shared by heads / key heads queries.
        value: as `key`.
        mask: bool `[batch or 1, 1, 1, positions]`, False where a position is hidden; or None.
        scale: of the scores.

    Returns:
        `[batch, 1, heads, dim]`.
    """
    attended: Tensor = torch.ops.dbllm.attend_one_cpu(
        query, key, value, mask_argument(query, mask), scale
    )
    return attended


def mask_argument(query: Tensor, mask: Tensor | None) -> Tensor:
    """A mask as the compiled operators take it: `[0, 0]` for none."""
    return query.new_empty(0, 0, dtype=torch.bool) if mask is None else mask.contiguous()


@torch.library.register_fake("dbllm::attend_one_cpu")  # type: ignore[untyped-decorator]
def _attend_one_shape(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    batch, heads, _, dim = query.shape
    return query.new_empty(batch, 1, heads, dim)

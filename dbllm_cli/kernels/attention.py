"""Attention on the CPU: of one query a sequence, as decoding needs it, and of whole sequences.

torch's own flash attention makes tiles of one row of the one, and takes ten times as long; of the
other it takes more than twice as long.
"""

import torch
from torch import Tensor

from dbllm_cli.kernels.cpu import cpu_kernels

_DTYPES = (torch.float32, torch.bfloat16)
_LARGEST_HEAD = 512
_MOST_SHARED = 64
_TILE_QUERIES = 128


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


def can_attend_causal(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_causal` takes these and is faster: sequences of some tiles in bfloat16."""
    device = query.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else query.dtype
    return (
        device == "cpu"
        and dtype == torch.bfloat16
        and query.shape[2] == key.shape[2] >= 2 * _TILE_QUERIES
        and key.shape == value.shape
        and query.shape[1] % key.shape[1] == 0
    )


def attend_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of every position to itself and those before it, by tiles of queries.

    Differentiable. Products, scores and weights are bfloat16, sums float32.

    Args:
        query: `[batch, heads, positions, dim]`.
        key: `[batch, key heads, positions, dim]`; each is shared by heads / key heads queries.
        value: as `key`.
        scale: of the scores.

    Returns:
        bfloat16 `[batch, positions, heads, dim]`.
    """
    batch, heads, positions, dim = query.shape
    groups, shared = batch * key.shape[1], heads // key.shape[1]
    query, key, value = ((x.to(torch.bfloat16)) for x in (query * scale, key, value))
    query = query.reshape(groups, shared, positions, dim)
    key, value = (x.reshape(groups, positions, dim) for x in (key, value))
    hidden = torch.ones(_TILE_QUERIES, _TILE_QUERIES, dtype=torch.bool).triu(1)
    tiles = []
    with torch.autocast("cpu", enabled=False):
        for first in range(0, positions, _TILE_QUERIES):
            last = min(first + _TILE_QUERIES, positions)
            rows = last - first
            tile = query[:, :, first:last].reshape(groups, shared * rows, dim)
            scores = torch.bmm(tile, key[:, :last].mT).view(groups, shared, rows, last)
            scores[..., first:].masked_fill_(hidden[:rows, :rows], -torch.inf)
            weights = torch.softmax(scores, -1).view(groups, shared * rows, last)
            tiles.append(torch.bmm(weights, value[:, :last]).view(groups, shared, rows, dim))
    return torch.cat(tiles, 2).view(batch, heads, positions, dim).transpose(1, 2).contiguous()

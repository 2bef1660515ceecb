"""The packed product in plain torch: what every faster route is compared with."""

import torch
from torch import Tensor

from dbllm_cli.kernels.packing import unpack_planes


def dequantize(
    weight: Tensor, scales: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The dense matrix `alpha1·b1 + alpha2·b2` (DB-LLM, eq. of Flexible Dual Binarization), + beta.

    Args:
        weight: planes, uint8 `[2, out, ceil(in_features / 8)]`.
        scales: scales, and the offset beta where there is one, floating `[2 or 3, out, groups]`.
        in_features: inputs of the layer.
        group_size: inputs that share their scales; the last group may be shorter.
        dtype: dtype of the result; sums are made in float32 and rounded once.

    Returns:
        `[out, in_features]`.
    """
    out_features, groups = scales.shape[1:]
    padded = weight.shape[-1] * 8
    planes = unpack_planes(weight, padded, torch.float32)
    if padded != groups * group_size:
        planes = torch.nn.functional.pad(planes, (0, groups * group_size - padded))
    dense = levels_of(planes.view(2, out_features, groups, group_size), scales)
    return dense.to(dtype).view(out_features, -1)[:, :in_features]


def levels_of(grouped: Tensor, scales: Tensor) -> Tensor:
    """The level of every weight, float32 `[out, groups, group_size]`.

    Args:
        grouped: planes as numbers, float32 `[2, out, groups, group_size]`.
        scales: as `dequantize` takes it.
    """
    scales = scales.to(torch.float32).unsqueeze(-1)
    dense = torch.addcmul(grouped[0] * scales[0], grouped[1], scales[1])
    offset = offset_of(scales)
    return dense if offset is None else dense.add_(offset)


def offset_of(scales: Tensor) -> Tensor | None:
    """The offset beta `[...]` of scales `[2 or 3, ...]`; None where there is none."""
    return scales[2] if len(scales) > 2 else None


def fdb_linear_reference(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """See `dbllm_cli.kernels.operator.fdb_linear`."""
    dense = dequantize(weight, scales, x.shape[-1], group_size, x.dtype)
    return torch.nn.functional.linear(x, dense, bias)

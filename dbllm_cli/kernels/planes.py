"""Dense weights from planes and float32 scales, and the gradient back, in one pass on the CPU.

Plain torch unpacks the planes to float32 for it, forward and backward, at every step of training.
"""

import torch
from torch import Tensor

from dbllm_cli.kernels.cpu import cpu_kernels
from dbllm_cli.kernels.latents import DENSE_DTYPES


def can_scale_planes(scales: Tensor, group_size: int, dtype: torch.dtype) -> bool:
    """Whether `plane_levels` and `plane_gradients` take these."""
    on_cpu = scales.device.type == "cpu" and scales.dtype == torch.float32
    whole = group_size % 8 == 0
    return on_cpu and whole and dtype in DENSE_DTYPES and cpu_kernels() is not None


def plane_levels(
    planes: Tensor, scales: Tensor, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The dense matrix, as `dequantize`.

    Args:
        planes: uint8 `[2, out, ceil(in / 8)]`.
        scales: scales, and the offset beta where there is one, float32 `[2 or 3, out, groups]`.
        in_features: inputs of the layer.
        group_size: inputs that share their scales, a multiple of 8.
        dtype: of the result, float32 or bfloat16.

    Returns:
        `[out, in]`.
    """
    dense: Tensor = torch.ops.dbllm.plane_levels_cpu(
        planes.contiguous(), scales.contiguous(), in_features, group_size, dtype == torch.bfloat16
    )
    return dense


def plane_gradients(dense: Tensor, planes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """The gradient of the scales: sums over each plane, and of beta over all of a group's weights.

    Args:
        dense: gradient of the dense weights, float32 or bfloat16 `[out, in]`.
        planes: as given to `plane_levels`.
        scales: as given to `plane_levels`; a group without scales gets no gradient of beta.
        group_size: inputs that share their scales.

    Returns:
        float32, the shape of `scales`.
    """
    to_alpha: Tensor = torch.ops.dbllm.plane_gradients_cpu(
        dense.contiguous(), planes.contiguous(), scales.contiguous(), group_size
    )
    return to_alpha

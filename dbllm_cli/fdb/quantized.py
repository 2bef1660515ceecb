"""A quantized matrix, planes and scales, as every stage stores it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dbllm_cli.fdb.groups import from_groups, to_groups
from dbllm_cli.fdb.levels import assign_planes, project_signs
from dbllm_cli.fdb.packing import pack_planes
from dbllm_cli.kernels import dequantize


@dataclass(frozen=True)
class QuantizedMatrix:
    """Planes and float16 scales of one layer.

    Attributes:
        weight: planes b1 and b2, uint8 `[2, out, ceil(in / 8)]`.
        alpha: scales alpha1 and alpha2, float16 `[2, out, groups]`.
        in_features: inputs of the layer.
        group_size: inputs that share two scales.
    """

    weight: Tensor
    alpha: Tensor
    in_features: int
    group_size: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized matrix `[out, in]`."""
        return dequantize(self.weight, self.alpha, self.in_features, self.group_size, dtype)


def round_scales(alpha: Tensor) -> Tensor:
    """Scales with their signs projected, rounded to float16: what is stored.

    Args:
        alpha: `[2, out, groups]`.

    Raises:
        ValueError: a scale is not finite in float16.
    """
    rounded = torch.stack(project_signs(alpha[0], alpha[1])).to(torch.float16)
    if not torch.isfinite(rounded).all():
        raise ValueError("a scale is not finite in float16")
    return rounded


def quantize_matrix(matrix: Tensor, alpha: Tensor, group_size: int) -> QuantizedMatrix:
    """Round the scales to float16, then derive the planes once from the rounded scales.

    Args:
        matrix: weights or latent weights `[out, in]`.
        alpha: scales `[2, out, groups]`.
        group_size: inputs that share two scales.

    Raises:
        ValueError: a scale is not finite in float16.
    """
    rounded = round_scales(alpha)
    scales = rounded.to(torch.float32).unsqueeze(-1)
    grouped = to_groups(matrix.to(torch.float32), group_size)
    planes = torch.stack(assign_planes(grouped, scales[0], scales[1]))
    packed = pack_planes(from_groups(planes, matrix.shape[-1]))
    return QuantizedMatrix(packed, rounded, matrix.shape[-1], group_size)

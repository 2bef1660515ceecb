"""A quantized matrix, planes and scales, as every stage stores it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dbllm_cli.fdb.groups import from_groups, to_groups
from dbllm_cli.fdb.levels import assign_planes, clamp_to_cells
from dbllm_cli.fdb.schemes import Scheme, open_scheme
from dbllm_cli.kernels import dequantize, pack_planes, unpack_planes


@dataclass(frozen=True)
class QuantizedMatrix:
    """Planes and float16 scales of one layer.

    Attributes:
        weight: planes b1 and b2, uint8 `[2, out, ceil(in / 8)]`.
        scales: scales alpha1 and alpha2, and beta where there is an offset, float16
            `[2 or 3, out, groups]`.
        in_features: inputs of the layer.
        group_size: inputs that share their scales.
        levels: its scheme of levels (`fdb.schemes`).
    """

    weight: Tensor
    scales: Tensor
    in_features: int
    group_size: int
    levels: str = "plain"

    @property
    def scheme(self) -> Scheme:
        """The scheme of its levels."""
        return open_scheme(self.levels)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized matrix `[out, in]`."""
        return dequantize(self.weight, self.scales, self.in_features, self.group_size, dtype)


@dataclass(frozen=True)
class PlaneCounts:
    """How often each code occurs: the basis of the paper's accounting (DB-LLM, section 4.3).

    Attributes:
        weights: weights counted.
        ones_b1: ones in plane b1.
        ones_b2: ones in plane b2.
        ones_both: weights with ones in both planes.
    """

    weights: int
    ones_b1: int
    ones_b2: int
    ones_both: int

    def __add__(self, other: "PlaneCounts") -> "PlaneCounts":
        return PlaneCounts(
            self.weights + other.weights,
            self.ones_b1 + other.ones_b1,
            self.ones_b2 + other.ones_b2,
            self.ones_both + other.ones_both,
        )

    @property
    def additions_per_weight(self) -> float:
        """Additions of activations per weight when the zeros of a plane are skipped."""
        return (self.ones_b1 + self.ones_b2) / self.weights

    @property
    def level_entropy(self) -> float:
        """Entropy of the level index, bits per weight: what an entropy coder could reach."""
        only1, only2 = self.ones_b1 - self.ones_both, self.ones_b2 - self.ones_both
        none = self.weights - only1 - only2 - self.ones_both
        shares = [count / self.weights for count in (none, only1, only2, self.ones_both)]
        return -sum(share * math.log2(share) for share in shares if share > 0)


def count_planes(quantized: QuantizedMatrix) -> PlaneCounts:
    """Count the codes of a layer."""
    b1, b2 = unpack_planes(quantized.weight, quantized.in_features, torch.uint8).bool()
    return PlaneCounts(b1.numel(), int(b1.sum()), int(b2.sum()), int((b1 & b2).sum()))


def stored_bits(quantized: QuantizedMatrix) -> int:
    """Bits of a layer as stored: planes, rows padded to whole bytes, and scales."""
    return quantized.weight.numel() * 8 + quantized.scheme.stored_bits(quantized.scales)


def quantize_matrix(
    matrix: Tensor, scales: Tensor, group_size: int, levels: str = "plain"
) -> QuantizedMatrix:
    """Round the scales to what is stored, then derive the planes once from the rounded scales.

    Args:
        matrix: weights or latent weights `[out, in]`.
        scales: scales `[2 or 3, out, groups]`.
        group_size: inputs that share their scales.
        levels: the scheme of levels.

    Raises:
        StageFailedError: a scale is not finite in float16.
    """
    rounded = open_scheme(levels).round(scales)
    packed = pack_cells(matrix, rounded, group_size)
    return QuantizedMatrix(packed, rounded, matrix.shape[-1], group_size, levels)


def pack_cells(matrix: Tensor, cells: Tensor, group_size: int) -> Tensor:
    """Packed planes of the nearest levels, uint8 `[2, out, ceil(in / 8)]`.

    Args:
        matrix: weights or latent weights `[out, in]`.
        cells: scales of the levels `[2 or 3, out, groups]`.
        group_size: inputs that share their scales.
    """
    grouped = to_groups(matrix.to(torch.float32), group_size)
    planes = assign_planes(grouped, cells.to(torch.float32).unsqueeze(-1))
    return pack_planes(from_groups(planes, matrix.shape[-1]))


def latent_start(quantized: QuantizedMatrix, teacher: Tensor, margin: float = 1e-3) -> Tensor:
    """Latent weights to start from: the teacher's weights, clamped into their codes' cells.

    Args:
        quantized: stored planes and scales.
        teacher: full-precision weights `[out, in]`, or gptq's compensated ones.
        margin: from the borders of a cell, as `clamp_to_cells` takes it.

    Returns:
        float32 `[out, in]`, with the same planes as `quantized`.
    """
    size = quantized.group_size
    planes = unpack_planes(quantized.weight, quantized.in_features, torch.float32).bool()
    scales = quantized.scales.to(torch.float32).unsqueeze(-1)
    grouped = to_groups(teacher.to(torch.float32), size)
    clamped = clamp_to_cells(grouped, to_groups(planes, size), scales, margin)
    return from_groups(clamped, teacher.shape[-1])

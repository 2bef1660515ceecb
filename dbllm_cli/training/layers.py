"""Layers that train: latent weights with scales, or scales alone over fixed planes.

The gradient is straight-through: 1 to a latent weight inside the outer cells' bounds, and to
alpha1, alpha2 and beta the sums over the group of gradient·b1, gradient·b2 and gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dbllm_cli.fdb.groups import from_groups, to_groups
from dbllm_cli.fdb.levels import (
    assign_planes,
    sorted_levels,
    straight_through_mask,
)
from dbllm_cli.fdb.linear import autocast_input
from dbllm_cli.fdb.quantized import QuantizedMatrix, pack_cells
from dbllm_cli.fdb.schemes import Scheme
from dbllm_cli.kernels import (
    can_round_latents,
    can_scale_planes,
    dequantize,
    latent_gradients,
    latent_levels,
    levels_of,
    offset_of,
    plane_gradients,
    plane_levels,
    unpack_planes,
)


def _scale_gradients(grad: Tensor, planes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    grouped = to_groups(grad.to(torch.float32), group_size)
    sums = [(grouped * plane).sum(-1) for plane in planes]
    if offset_of(scales) is not None:
        # A group without levels stays without them.
        sums.append(grouped.sum(-1) * ((scales[0] != 0) | (scales[1] != 0)))
    return torch.stack(sums)


class _LatentWeight(torch.autograd.Function):
    """Dense weights from latent weights: planes are derived anew, in backward too."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        scales: Tensor,
        cells: Tensor,
        group_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(latent, scales, cells)
        ctx.group_size = group_size
        if can_round_latents(latent, scales, dtype):
            return latent_levels(latent, scales, cells, group_size, dtype)
        planes = assign_planes(to_groups(latent, group_size), cells.unsqueeze(-1)).float()
        return from_groups(levels_of(planes, scales), latent.shape[-1]).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        latent, scales, cells = ctx.saved_tensors
        if can_round_latents(latent, scales, grad.dtype):
            return *latent_gradients(grad, latent, scales, cells, ctx.group_size), None, None, None
        grouped = to_groups(latent, ctx.group_size)
        planes = assign_planes(grouped, cells.unsqueeze(-1))
        passes = straight_through_mask(grouped, sorted_levels(cells.unsqueeze(-1)))
        to_latent = grad.to(torch.float32) * from_groups(passes, grad.shape[-1])
        return to_latent, _scale_gradients(grad, planes, scales, ctx.group_size), None, None, None


class _ScaledPlanes(torch.autograd.Function):
    """Dense weights from packed planes; keeps only the packed planes for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        scales: Tensor,
        in_features: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.in_features, ctx.group_size = in_features, group_size
        if can_scale_planes(scales, group_size, dtype):
            return plane_levels(packed, scales, in_features, group_size, dtype)
        return dequantize(packed, scales, in_features, group_size, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        packed, scales = ctx.saved_tensors
        if can_scale_planes(scales, ctx.group_size, grad.dtype):
            return None, plane_gradients(grad, packed, scales, ctx.group_size), None, None, None
        planes = to_groups(unpack_planes(packed, ctx.in_features, torch.float32), ctx.group_size)
        return None, _scale_gradients(grad, planes, scales, ctx.group_size), None, None, None


class _RoundedScales(torch.autograd.Function):
    """Scales as they are stored; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, scheme: Scheme) -> Tensor:
        del ctx
        if not scales.to(torch.float16).isfinite().all():
            # A code would be finite again: the loss is to tell.
            return scales.clone()
        return scheme.round(scales).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grad, None


class TrainableLinear(nn.Module):
    """Base of both layers that train: `scales` float32 `[2 or 3, out, groups]`, a frozen bias."""

    def __init__(self, quantized: QuantizedMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = quantized.in_features
        self.group_size = quantized.group_size
        self.levels = quantized.levels
        self.scheme = quantized.scheme
        self.rounds_scales = self.scheme.trains_rounded
        self.scales = nn.Parameter(quantized.scales.to(torch.float32))
        self.scales.register_hook(self._scheme_gradient)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())

    def _scheme_gradient(self, grad: Tensor) -> Tensor:
        return self.scheme.train_gradient(self.scales, grad)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix `[out, in]`, with gradients."""
        return self._dense(self.rounded_scales() if self.rounds_scales else self.scales, dtype)

    @torch.no_grad()
    def quantize(self) -> QuantizedMatrix:
        """What is stored: scales rounded, and their planes."""
        scales = self.scheme.round(self.scales)
        planes = self._planes(scales)
        return QuantizedMatrix(planes, scales, self.in_features, self.group_size, self.levels)

    def _dense(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix of these scales."""
        raise NotImplementedError

    def _planes(self, scales: Tensor) -> Tensor:
        """The packed planes that go with these scales."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`; under autocast the products are in its dtype."""
        x = autocast_input(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.dense(x.dtype), bias)

    def rounded_scales(self) -> Tensor:
        """The scales as `quantize` rounds them, float32; the gradient passes."""
        rounded: Tensor = _RoundedScales.apply(self.scales, self.scheme)
        return rounded

    @torch.no_grad()
    def project(self) -> None:
        """Bring the scales back to what a group may have, after every step."""
        self.scales.copy_(self.scheme.project(self.scales, self._upright()))

    def _upright(self) -> Tensor | None:
        """Which orientation the levels must keep, bool `[out, groups]`; None where either will do.

        Over fixed planes and moving cells the order of the two middle levels may change.
        """
        return None


class LatentLinear(TrainableLinear):
    """Trains latent weights `latent` float32 `[out, in]` and the scales.

    Args:
        quantized: planes and scales to start from.
        latent: latent weights `[out, in]`.
        bias: `[out]` or None.
        fixed_cells: a latent weight has the level of its cell among the scales of the start, which
            only its own gradient makes it leave; else among the scales as they are. At small
            rates moving cells would turn over the many weights that lie at a border.
    """

    def __init__(
        self,
        quantized: QuantizedMatrix,
        latent: Tensor,
        bias: Tensor | None,
        fixed_cells: bool = False,
    ) -> None:
        super().__init__(quantized, bias)
        # The fused optimizer goes through memory as if every parameter were contiguous.
        self.latent = nn.Parameter(latent.to(torch.float32).contiguous())
        self.cells: Tensor | None
        self.register_buffer("cells", self.scales.detach().clone() if fixed_cells else None)

    def _dense(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        result: Tensor = _LatentWeight.apply(
            self.latent, scales, self._cells(scales), self.group_size, dtype
        )
        return result

    def _planes(self, scales: Tensor) -> Tensor:
        return pack_cells(self.latent, self._cells(scales), self.group_size)

    def _upright(self) -> Tensor | None:
        return None if self.cells is None else self.cells[0] + self.cells[1] >= 0

    def _cells(self, scales: Tensor) -> Tensor:
        if self.cells is None:
            return scales.detach()
        # A group that lost its levels has no cells either.
        return self.cells * ((scales[0] != 0) | (scales[1] != 0))


class ScaleLinear(TrainableLinear):
    """Trains the scales over fixed planes `packed` uint8 `[2, out, ceil(in / 8)]`."""

    def __init__(self, quantized: QuantizedMatrix, bias: Tensor | None) -> None:
        super().__init__(quantized, bias)
        self.packed: Tensor
        self.register_buffer("packed", quantized.weight)

    def _dense(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        result: Tensor = _ScaledPlanes.apply(
            self.packed, scales, self.in_features, self.group_size, dtype
        )
        return result

    def _planes(self, scales: Tensor) -> Tensor:
        del scales
        return self.packed

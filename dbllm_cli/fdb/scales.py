"""How scales are stored: as they are, in 8 bits, or one for both planes.

`float8`: unsigned floats that share one float16 per row. A code has 3 bits of exponent and 5 of
mantissa, so that a scale is off by at most 1/64 of itself (0.65 % in the root mean square) over
eight octaves. Integers on a linear grid round the small groups of a row away. The sign needs no
bit: `alpha2 <= 0 <= alpha1`.

`tied`: one step d of either sign, the levels −d, 0, d and 2d, as GGUF's Q2_0 has them: of the two
scales one is twice the other. They are tied from the start and at every step of training.
"""

from typing import Literal

import torch
from torch import Tensor

ScaleFormat = Literal["float16", "float8", "tied"]

_MANTISSAS = 32
_EXPONENTS = 8


def _unit_scales(device: torch.device) -> Tensor:
    """The 256 values, ascending from 0 to 1, float32; the first 32 are subnormal."""
    code = torch.arange(_EXPONENTS * _MANTISSAS, dtype=torch.float32, device=device)
    exponent, mantissa = code // _MANTISSAS, code % _MANTISSAS
    normal = (_MANTISSAS + mantissa) * torch.exp2(exponent - 1)
    values = torch.where(exponent > 0, normal, mantissa)
    return values / values[-1]


def encode_scales(alpha: Tensor, row_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest codes.

    Args:
        alpha: float16 `[2, out, groups]`, `alpha2 <= 0 <= alpha1`.
        row_scale: float16 `[out]`, what the codes of a row are shares of; its largest scale when
            absent. With the row scales that they were decoded by, codes come back that stand for
            the same scales.

    Returns:
        Codes uint8 `[2, out, groups]` and row scales float16 `[out]`.
    """
    if row_scale is None:
        row_scale = alpha.abs().amax((0, 2)).to(torch.float16)
    divisor = torch.where(row_scale > 0, row_scale, 1).to(torch.float32)
    shares = alpha.to(torch.float32).abs() / divisor.unsqueeze(-1)
    values = _unit_scales(alpha.device)
    midpoints = (values[1:] + values[:-1]) / 2
    return torch.bucketize(shares, midpoints).to(torch.uint8), row_scale


def decode_scales(codes: Tensor, row_scale: Tensor) -> Tensor:
    """The inverse of `encode_scales`: float16 `[2, out, groups]`."""
    sizes = _unit_scales(codes.device)[codes.long()] * row_scale.to(torch.float32).unsqueeze(-1)
    signs = torch.tensor((1.0, -1.0), device=codes.device).view(2, 1, 1)
    return (sizes * signs).to(torch.float16)


def tied_units(upright: Tensor) -> tuple[Tensor, Tensor]:
    """What alpha1 and alpha2 are in steps: 2 and −1 where upright, else 1 and −2."""
    return torch.where(upright, 2.0, 1.0), torch.where(upright, -1.0, -2.0)


def tie_scales(alpha1: Tensor, alpha2: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest scales of which the larger is twice the smaller.

    Args:
        alpha1: not negative, any shape.
        alpha2: not positive, the same shape.
    """
    unit1, unit2 = tied_units(alpha1 + alpha2 >= 0)
    step = (unit1 * alpha1 + unit2 * alpha2) / 5
    return unit1 * step, unit2 * step


def join_tied(alpha: Tensor) -> Tensor:
    """Tied scales `[2, out, groups]` as their signed step d `[1, out, groups]`."""
    alpha1, alpha2 = alpha
    return torch.where(alpha1 + alpha2 >= 0, -alpha2, -alpha1).unsqueeze(0)


def split_tied(step: Tensor) -> Tensor:
    """The inverse of `join_tied`: levels d·(−1, 0, 1, 2)."""
    positive, negative = step.clamp(min=0), step.clamp(max=0)
    return torch.cat((2 * positive - negative, 2 * negative - positive))

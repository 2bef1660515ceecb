"""The four levels of a group and the choice among them (DB-LLM, Flexible Dual Binarization).

Each weight is `alpha1·b1 + alpha2·b2` with `b1, b2` in {0, 1} and `alpha2 <= 0 <= alpha1`: its
levels are alpha2, 0, alpha1 + alpha2 and alpha1. The middle two swap places with the sign of
alpha1 + alpha2, the group's orientation. The paper's rule `b1 = H(w − (alpha1+alpha2)/2)`,
`b2 = H(−(w − alpha1·b1 − alpha2/2))` is the nearest level where that sum is positive, ties too:
the middle tie goes up, the outer ties go down. A third scale, the offset beta, moves all four.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dbllm_cli.kernels import offset_of

_LEAST_OUTER = 1e-3
"""Of the range of the levels: how far `clamp_to_cells` goes into an outer cell at least."""


class Levels(NamedTuple):
    """The sorted levels of each group and the borders between them, all of one shape."""

    lowest: Tensor
    lower: Tensor
    upper: Tensor
    highest: Tensor

    @property
    def borders(self) -> tuple[Tensor, Tensor, Tensor]:
        """Midpoints between neighbouring levels, ascending."""
        return (
            (self.lowest + self.lower) / 2,
            (self.lower + self.upper) / 2,
            (self.upper + self.highest) / 2,
        )


def sorted_levels(scales: Tensor) -> Levels:
    """Levels alpha2, min(0, s), max(0, s), alpha1 with s = alpha1 + alpha2, moved by the offset.

    Args:
        scales: alpha1, not negative, alpha2, not positive, and beta where there is an offset:
            `[2 or 3, ...]`.
    """
    middle = scales[0] + scales[1]
    levels = Levels(scales[1], middle.clamp(max=0), middle.clamp(min=0), scales[0])
    offset = offset_of(scales)
    return levels if offset is None else Levels(*(level + offset for level in levels))


def project_signs(alpha1: Tensor, alpha2: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest scales with `alpha2 <= 0 <= alpha1`."""
    return alpha1.clamp(min=0), alpha2.clamp(max=0)


def nearest_level(grouped: Tensor, levels: Levels) -> Tensor:
    """The nearest level of each weight.

    Args:
        grouped: weights `[..., group_size]`.
        levels: of shape `[..., 1]`.

    Returns:
        Dequantized weights, the shape and dtype of `grouped`.
    """
    first, second, third = levels.borders
    low = torch.where(grouped > first, levels.lower, levels.lowest)
    high = torch.where(grouped > third, levels.highest, levels.upper)
    return torch.where(grouped >= second, high, low)


def assign_planes(grouped: Tensor, scales: Tensor) -> Tensor:
    """Planes of the nearest level of each weight.

    Args:
        grouped: weights `[..., group_size]`.
        scales: as `sorted_levels` takes it, `[2 or 3, ..., 1]`.

    Returns:
        b1 and b2, bool `[2, ..., group_size]`. A group without scales has empty planes.
    """
    first, second, third = sorted_levels(scales).borders
    above_first, above_second, above_third = grouped > first, grouped >= second, grouped > third
    upright = scales[0] + scales[1] >= 0
    b1 = torch.where(upright, above_second, above_third | (above_first & ~above_second))
    b2 = torch.where(upright, ~above_first | (above_second & ~above_third), ~above_second)
    alive = (scales[0] != 0) | (scales[1] != 0)
    return torch.stack((b1 & alive, b2 & alive))


def straight_through_mask(grouped: Tensor, levels: Levels) -> Tensor:
    """Where the gradient passes to a latent weight.

    True from half a step below the lowest level to half a step above the highest, where a step is
    the distance to the next level.

    Args:
        grouped: latent weights `[..., group_size]`.
        levels: of shape `[..., 1]`.
    """
    below, above = _passing_bounds(levels)
    return (grouped >= below) & (grouped <= above)


def _passing_bounds(levels: Levels) -> tuple[Tensor, Tensor]:
    below = levels.lowest - (levels.lower - levels.lowest) / 2
    above = levels.highest + (levels.highest - levels.upper) / 2
    return below, above


def clamp_to_cells(grouped: Tensor, planes: Tensor, scales: Tensor, margin: float = 1e-3) -> Tensor:
    """The weight nearest to each given one that still has the same planes.

    So training can start from a full-precision weight without changing a stored plane.

    Args:
        grouped: full-precision weights `[..., group_size]`.
        planes: b1 and b2, bool `[2, ..., group_size]`.
        scales: as `sorted_levels` takes it, `[2 or 3, ..., 1]`.
        margin: how far from a border the result stays, as a share of the cell, where an outer one
            ends with the straight-through gradient; above 0, so that rounding does not cross it.
    """
    levels = sorted_levels(scales)
    below, above = _passing_bounds(levels)
    edges = torch.stack((below, *levels.borders, above), dim=-1).expand(*grouped.shape, 5)
    first, second = planes.long()
    upright = scales[0] + scales[1] >= 0
    rank = torch.where(upright, 1 + 2 * first - second, 2 + first - 2 * second)
    lower = edges.gather(-1, rank.unsqueeze(-1)).squeeze(-1)
    upper = edges.gather(-1, rank.unsqueeze(-1) + 1).squeeze(-1)
    inset = (upper - lower) * margin
    # An outer cell is empty where two levels coincide; an inner one never is.
    least = (levels.highest - levels.lowest) * _LEAST_OUTER
    outer = torch.maximum(inset, least)
    from_lower = lower + torch.where(rank == 3, outer, inset)
    from_upper = upper - torch.where(rank == 0, outer, inset)
    kept = torch.maximum(grouped, from_lower.masked_fill(rank == 0, -torch.inf))
    return torch.minimum(kept, from_upper.masked_fill(rank == 3, torch.inf))

"""What the fits of plain and tied levels share: a search of the step, then alternation."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dbllm_cli.fdb.levels import assign_planes, nearest_level, project_signs, sorted_levels

_GRID = torch.linspace(0.20, 1.05, 35)
"""Steps tried, as shares of max|w| / 2."""
_ALTERNATIONS = 12


class Candidate(NamedTuple):
    """Scales `[2 or 3, rows, groups, 1]` and their weighted square error `[rows, groups, 1]`."""

    scales: Tensor
    error: Tensor

    @classmethod
    def of(cls, grouped: Tensor, importance: Tensor, scales: Tensor) -> Self:
        """These scales, with the nearest level for every weight."""
        difference = nearest_level(grouped, sorted_levels(scales)) - grouped
        return cls(scales, (difference.square_() * importance).sum(-1, keepdim=True))

    def or_better(self, other: "Candidate") -> "Candidate":
        """The better one of each group, this where they are level."""
        better = other.error < self.error
        scales = torch.where(better, other.scales, self.scales)
        return Candidate(scales, torch.where(better, other.error, self.error))


def step_sizes(grouped: Tensor) -> Tensor:
    """The paper's step of each group, max|w| / 2 `[..., 1]`."""
    return grouped.abs().amax(-1, keepdim=True) / 2


def search_step(grouped: Tensor, importance: Tensor) -> Candidate:
    """Best share of the paper's step, and orientation, for every group; and its error."""
    step = step_sizes(grouped)
    unit = grouped / torch.where(step > 0, step, 1.0)
    best = Candidate(torch.stack((2 * step, -step)), torch.full_like(step, torch.inf))
    for share in _GRID.tolist():
        rounded = (unit / share).round_()
        for lowest, highest in ((-1, 2), (-2, 1)):
            difference = rounded.clamp(lowest, highest).mul_(share).sub_(unit)
            error = (difference.square_() * importance).sum(-1, keepdim=True) * step.square()
            scales = torch.stack((highest * share * step, lowest * share * step))
            best = best.or_better(Candidate(scales, error))
    return best


def alternate(
    grouped: Tensor, importance: Tensor, fitted: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Nearest levels and best scales in turn, from the best step.

    Args:
        grouped: weights, float32 `[rows, groups, group_size]`.
        importance: weight of each error, broadcast to `grouped`.
        fitted: from planes, bool `[2, rows, groups, group_size]`, and the scales that they were
            assigned by, `[2, rows, groups, 1]`, the best scales for these planes.

    Returns:
        float32 `[2, rows, groups, 1]`.
    """
    best = search_step(grouped, importance)
    for _ in range(_ALTERNATIONS):
        scales = fitted(assign_planes(grouped, best.scales), best.scales)
        best = best.or_better(Candidate.of(grouped, importance, scales))
    return best.scales


def least_squares_scales(grouped: Tensor, importance: Tensor, planes: Tensor) -> Tensor:
    """The scales with the least weighted square error for given planes: a 2×2 system per group.

    Args:
        grouped: weights `[..., group_size]`.
        importance: weight of each error, broadcast to `grouped`.
        planes: b1 and b2, bool `[2, ..., group_size]`.

    Returns:
        alpha1 and alpha2 `[2, ..., 1]`, signs projected. A plane that is empty gets scale 0.
    """
    b1, b2 = planes
    first, second = b1 * importance, b2 * importance
    a11 = first.sum(-1, keepdim=True)
    a22 = second.sum(-1, keepdim=True)
    a12 = (first * b2).sum(-1, keepdim=True)
    y1 = (first * grouped).sum(-1, keepdim=True)
    y2 = (second * grouped).sum(-1, keepdim=True)
    determinant = a11 * a22 - a12 * a12
    singular = determinant <= 1e-6 * a11 * a22
    safe = torch.where(singular, 1.0, determinant)
    alone1 = torch.where(a11 > 0, y1 / a11, 0.0)
    alone2 = torch.where(a22 > 0, y2 / a22, 0.0)
    alpha1 = torch.where(singular, alone1, (a22 * y1 - a12 * y2) / safe)
    alpha2 = torch.where(singular, alone2, (a11 * y2 - a12 * y1) / safe)
    # Where one sign is wrong the constrained optimum has that scale at zero.
    only1, only2 = alpha2 > 0, alpha1 < 0
    alpha1 = torch.where(only1, alone1, alpha1)
    alpha2 = torch.where(only2, alone2, alpha2)
    return torch.stack(project_signs(alpha1, alpha2))

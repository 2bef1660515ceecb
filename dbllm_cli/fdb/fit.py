"""Starting planes and scales of a matrix: `paper`, `mse` and `als`.

Errors are weighted by the mean square of each input, the diagonal of XᵀX, so that they estimate
the error of the layer's output.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dbllm_cli.fdb.groups import to_groups
from dbllm_cli.fdb.levels import assign_planes, nearest_level, project_signs, sorted_levels
from dbllm_cli.fdb.scales import tied_units

_GRID = torch.linspace(0.20, 1.05, 35)
"""Steps tried by `mse`, as shares of max|w| / 2."""
_ALTERNATIONS = 12
_CHUNK_WEIGHTS = 1 << 22
"""Weights fitted at once: bounds the work memory whatever the layer."""


def fit_scales(
    matrix: Tensor,
    group_size: int,
    method: str,
    input_weights: Tensor | None = None,
    tied: bool = False,
) -> Tensor:
    """Scales of every group.

    Args:
        matrix: weights `[out, in]`.
        group_size: inputs that share two scales.
        method: `paper` (step max|w|/2), `mse` (best step by search, either orientation) or `als`
            (from `mse`, alternate nearest-level assignment and least squares).
        input_weights: importance of each input `[in]`, not negative; equal when absent.
        tied: `als` keeps one scale twice the other (`fdb.scales`); in the other methods it is.

    Returns:
        alpha1 and alpha2, float32 `[2, out, groups]`.
    """
    fits: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "paper": _fit_paper,
        "mse": _fit_mse,
        "als": partial(_fit_als, tied=tied),
    }
    fit = fits[method]
    if input_weights is None:
        input_weights = torch.ones(matrix.shape[-1], device=matrix.device)
    importance = to_groups(input_weights.to(torch.float32), group_size)
    rows = max(1, _CHUNK_WEIGHTS // matrix.shape[-1])
    chunks = [
        torch.stack(fit(to_groups(part.to(torch.float32), group_size), importance))
        for part in matrix.split(rows)
    ]
    return torch.cat(chunks, dim=1).squeeze(-1)


def _step_sizes(grouped: Tensor) -> Tensor:
    return grouped.abs().amax(-1, keepdim=True) / 2


def _fit_paper(grouped: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """INT2 with step s = max|w|/2: alpha1 = 2s, alpha2 = −s (DB-LLM, initialization)."""
    del importance
    step = _step_sizes(grouped)
    return 2 * step, -step


_Candidate = tuple[Tensor, Tensor, Tensor]
"""alpha1, alpha2 and weighted error of every group, `[rows, groups, 1]` each."""


def _better(best: _Candidate, found: _Candidate) -> _Candidate:
    better = found[2] < best[2]
    alpha1, alpha2, error = (
        torch.where(better, new, old) for new, old in zip(found, best, strict=True)
    )
    return alpha1, alpha2, error


def _weighted_error(grouped: Tensor, importance: Tensor, alpha1: Tensor, alpha2: Tensor) -> Tensor:
    difference = nearest_level(grouped, sorted_levels(alpha1, alpha2)) - grouped
    return (difference.square_() * importance).sum(-1, keepdim=True)


def _search_step(grouped: Tensor, importance: Tensor) -> _Candidate:
    """Best share of the paper's step, and orientation, for every group; and its error."""
    step = _step_sizes(grouped)
    unit = grouped / torch.where(step > 0, step, 1.0)
    best = (2 * step, -step, torch.full_like(step, torch.inf))
    for share in _GRID.tolist():
        rounded = (unit / share).round_()
        for lowest, highest in ((-1, 2), (-2, 1)):
            difference = rounded.clamp(lowest, highest).mul_(share).sub_(unit)
            error = (difference.square_() * importance).sum(-1, keepdim=True) * step.square()
            best = _better(best, (highest * share * step, lowest * share * step, error))
    return best


def _fit_mse(grouped: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    return _search_step(grouped, importance)[:2]


def _fit_als(grouped: Tensor, importance: Tensor, tied: bool) -> tuple[Tensor, Tensor]:
    best = _search_step(grouped, importance)
    for _ in range(_ALTERNATIONS):
        b1, b2 = assign_planes(grouped, best[0], best[1])
        if tied:
            units = tied_units(best[0] + best[1] >= 0)
            alpha1, alpha2 = _least_squares_step(grouped, importance, b1, b2, units)
        else:
            alpha1, alpha2 = least_squares_scales(grouped, importance, b1, b2)
        error = _weighted_error(grouped, importance, alpha1, alpha2)
        best = _better(best, (alpha1, alpha2, error))
    return best[:2]


def _least_squares_step(
    grouped: Tensor, importance: Tensor, b1: Tensor, b2: Tensor, units: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The tied scales with the least weighted square error for given planes and orientation."""
    unit = units[0] * b1 + units[1] * b2
    weighted = unit * importance
    size = (weighted * unit).sum(-1, keepdim=True)
    step = (weighted * grouped).sum(-1, keepdim=True) / torch.where(size > 0, size, 1.0)
    return project_signs(units[0] * step, units[1] * step)


def least_squares_scales(
    grouped: Tensor, importance: Tensor, b1: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    """The scales with the least weighted square error for given planes: a 2×2 system per group.

    Args:
        grouped: weights `[..., group_size]`.
        importance: weight of each error, broadcast to `grouped`.
        b1: plane, bool, the shape of `grouped`.
        b2: plane, bool, the shape of `grouped`.

    Returns:
        alpha1 and alpha2 `[..., 1]`, signs projected. A plane that is empty gets scale 0.
    """
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
    return project_signs(alpha1, alpha2)

"""Starting planes and scales of a matrix: `paper`, `mse` and `als`.

Errors are weighted by the mean square of each input, the diagonal of XᵀX, so that they estimate
the error of the layer's output.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dbllm_cli.fdb.groups import to_groups
from dbllm_cli.fdb.levels import assign_planes, nearest_level, project_signs, sorted_levels
from dbllm_cli.fdb.scales import LevelKind, Spans, tied_units

_GRID = torch.linspace(0.20, 1.05, 35)
"""Steps tried by `mse`, as shares of max|w| / 2."""
_ALTERNATIONS = 12
_FIRST_ALTERNATIONS = 4
_CENTRES = (-0.7, -0.35, 0.0, 0.35, 0.7)
_NORMAL_OUTER, _NORMAL_INNER = 1.51, 0.453
"""Starts, in units of the root mean square: the best four levels of a normal weight, moved."""
_TINY = 1e-30
_CHUNK_WEIGHTS = 1 << 22
"""Weights fitted at once: bounds the work memory whatever the layer."""


def fit_scales(
    matrix: Tensor,
    group_size: int,
    method: str,
    input_weights: Tensor | None = None,
    levels: LevelKind = "plain",
) -> Tensor:
    """Scales of every group.

    Args:
        matrix: weights `[out, in]`.
        group_size: inputs that share their scales.
        method: `paper` (step max|w|/2), `mse` (best step by search, either orientation) or `als`
            (alternate nearest-level assignment and least squares).
        input_weights: importance of each input `[in]`, not negative; equal when absent.
        levels: which scales a group may have. `paper` and `mse` find tied ones, which are plain
            too; those with an offset `als` alone.

    Returns:
        alpha1 and alpha2, and beta with an offset, float32 `[2 or 3, out, groups]`.
    """
    fits: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "paper": _fit_paper,
        "mse": _fit_mse,
        "als": _fit_offset if levels == "offset" else partial(_fit_als, tied=levels == "tied"),
    }
    fit = fits[method]
    if input_weights is None:
        input_weights = torch.ones(matrix.shape[-1], device=matrix.device)
    importance = to_groups(input_weights.to(torch.float32), group_size)
    # Inputs that were always zero tell nothing of the weights.
    importance = torch.where(importance.sum(-1, keepdim=True) > 0, importance, 1.0)
    rows = max(1, _CHUNK_WEIGHTS // matrix.shape[-1])
    chunks = [
        fit(to_groups(part.to(torch.float32), group_size), importance)
        for part in matrix.split(rows)
    ]
    return torch.cat(chunks, dim=1).squeeze(-1)


class Candidate(NamedTuple):
    """Scales `[2 or 3, rows, groups, 1]` and their weighted square error `[rows, groups, 1]`."""

    alpha: Tensor
    error: Tensor

    @classmethod
    def of(cls, grouped: Tensor, importance: Tensor, alpha: Tensor) -> Self:
        """These scales, with the nearest level for every weight."""
        difference = nearest_level(grouped, sorted_levels(alpha)) - grouped
        return cls(alpha, (difference.square_() * importance).sum(-1, keepdim=True))

    def or_better(self, other: "Candidate") -> "Candidate":
        """The better one of each group, this where they are level."""
        better = other.error < self.error
        alpha = torch.where(better, other.alpha, self.alpha)
        return Candidate(alpha, torch.where(better, other.error, self.error))


def _step_sizes(grouped: Tensor) -> Tensor:
    return grouped.abs().amax(-1, keepdim=True) / 2


def _fit_paper(grouped: Tensor, importance: Tensor) -> Tensor:
    """INT2 with step s = max|w|/2: alpha1 = 2s, alpha2 = −s (DB-LLM, initialization)."""
    del importance
    step = _step_sizes(grouped)
    return torch.stack((2 * step, -step))


def _search_step(grouped: Tensor, importance: Tensor) -> Candidate:
    """Best share of the paper's step, and orientation, for every group; and its error."""
    step = _step_sizes(grouped)
    unit = grouped / torch.where(step > 0, step, 1.0)
    best = Candidate(torch.stack((2 * step, -step)), torch.full_like(step, torch.inf))
    for share in _GRID.tolist():
        rounded = (unit / share).round_()
        for lowest, highest in ((-1, 2), (-2, 1)):
            difference = rounded.clamp(lowest, highest).mul_(share).sub_(unit)
            error = (difference.square_() * importance).sum(-1, keepdim=True) * step.square()
            alpha = torch.stack((highest * share * step, lowest * share * step))
            best = best.or_better(Candidate(alpha, error))
    return best


def _fit_mse(grouped: Tensor, importance: Tensor) -> Tensor:
    return _search_step(grouped, importance).alpha


def _fit_als(grouped: Tensor, importance: Tensor, tied: bool) -> Tensor:
    best = _search_step(grouped, importance)
    for _ in range(_ALTERNATIONS):
        planes = assign_planes(grouped, best.alpha)
        if tied:
            units = tied_units(best.alpha[0] + best.alpha[1] >= 0)
            alpha = _least_squares_step(grouped, importance, planes, units)
        else:
            alpha = least_squares_scales(grouped, importance, planes)
        best = best.or_better(Candidate.of(grouped, importance, alpha))
    return best.alpha


def _least_squares_step(
    grouped: Tensor, importance: Tensor, planes: Tensor, units: tuple[Tensor, Tensor]
) -> Tensor:
    """The tied scales with the least weighted square error for given planes and orientation."""
    unit = units[0] * planes[0] + units[1] * planes[1]
    weighted = unit * importance
    size = (weighted * unit).sum(-1, keepdim=True)
    step = (weighted * grouped).sum(-1, keepdim=True) / torch.where(size > 0, size, 1.0)
    return torch.stack(project_signs(units[0] * step, units[1] * step))


def _fit_offset(grouped: Tensor, importance: Tensor) -> Tensor:
    """Alternation from several centres; the best one goes on."""
    total = importance.sum(-1, keepdim=True).clamp(min=_TINY)
    spread = ((grouped.square() * importance).sum(-1, keepdim=True) / total).sqrt()
    best = None
    for centre in _CENTRES:
        spans = Spans(centre * spread, _NORMAL_OUTER * spread, _NORMAL_INNER * spread)
        for _ in range(_FIRST_ALTERNATIONS):
            spans = _least_squares_spans(grouped, importance, spans)
        found = Candidate.of(grouped, importance, spans.alpha)
        best = found if best is None else best.or_better(found)
    assert best is not None
    spans = Spans.of(best.alpha)
    for _ in range(_ALTERNATIONS):
        spans = _least_squares_spans(grouped, importance, spans)
    return best.or_better(Candidate.of(grouped, importance, spans.alpha)).alpha


def _least_squares_spans(grouped: Tensor, importance: Tensor, spans: Spans) -> Spans:
    """The spans with the least weighted square error for the levels that are nearest now.

    A weight is the centre, plus or minus outer or inner: for a given centre both of these are
    means, so that one equation is left for it.
    """
    half = (spans.outer + spans.inner) / 2
    weighted = grouped * importance
    borders = (spans.centre - half, spans.centre, spans.centre + half)
    counts, sums = [importance.sum(-1, keepdim=True)], [weighted.sum(-1, keepdim=True)]
    for border in borders:
        above = grouped > border
        counts.append((importance * above).sum(-1, keepdim=True))
        sums.append((weighted * above).sum(-1, keepdim=True))
    outer_count, inner_count = counts[0] - counts[1] + counts[3], counts[1] - counts[3]
    outer_tilt, outer_sum = (each[3] - each[0] + each[1] for each in (counts, sums))
    inner_tilt, inner_sum = (2 * each[2] - each[3] - each[1] for each in (counts, sums))
    outer_share = outer_tilt / outer_count.clamp(min=_TINY)
    inner_share = inner_tilt / inner_count.clamp(min=_TINY)
    rest = counts[0] - outer_tilt * outer_share - inner_tilt * inner_share
    target = sums[0] - outer_sum * outer_share - inner_sum * inner_share
    centre = torch.where(rest > 1e-6 * counts[0], target / rest.clamp(min=_TINY), spans.centre)
    outer = outer_sum / outer_count.clamp(min=_TINY) - centre * outer_share
    inner = inner_sum / inner_count.clamp(min=_TINY) - centre * inner_share
    return Spans(centre, outer, inner).project()


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

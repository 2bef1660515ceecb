"""Levels with an offset as their distances from a centre."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from dbllm_cli.fdb.schemes._codes import LARGEST_CENTRE

_TINY = 1e-30


class Spans(NamedTuple):
    """Levels with an offset: `centre ± outer` and `centre ± inner`, all of one shape."""

    centre: Tensor
    outer: Tensor
    inner: Tensor

    @classmethod
    def of(cls, scales: Tensor) -> Self:
        """From alpha1, alpha2 and beta `[3, ...]`."""
        middle = (scales[0] + scales[1]) / 2
        return cls(scales[2] + middle, (scales[0] - scales[1]) / 2, middle)

    @property
    def scales(self) -> Tensor:
        """alpha1, alpha2 and beta `[3, ...]`, upright: `alpha1 + alpha2 >= 0`."""
        centre, outer, inner = self
        return torch.stack((outer + inner, inner - outer, centre - inner))

    def project(self) -> "Spans":
        """Each number brought into range: `0 <= inner <= outer`, a centre that a code reaches."""
        outer = self.outer.clamp(min=0)
        reach = LARGEST_CENTRE * outer
        centre = torch.minimum(torch.maximum(self.centre, -reach), reach)
        return Spans(centre, outer, torch.minimum(self.inner.clamp(min=0), outer))


def least_squares_spans(grouped: Tensor, importance: Tensor, spans: Spans) -> Spans:
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

"""One float16 step d, -d, 0, d and 2d as GGUF's Q2_0 has them.

Of the two scales one is twice the other; d has either sign. They are tied from the start and at
every step of training.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dbllm_cli.fdb.alternation import alternate
from dbllm_cli.fdb.levels import project_signs
from dbllm_cli.fdb.schemes import Scheme

METHODS = ("als", "mse", "paper")


class Tied(Scheme):
    """One scale, twice the other."""

    format_version = 3
    note = "one scale per group, levels -d, 0, d and 2d"

    def fit(self, grouped: Tensor, importance: Tensor) -> Tensor:
        """See `Scheme.fit`."""

        def fitted(planes: Tensor, scales: Tensor) -> Tensor:
            units = tied_units(scales[0] + scales[1] >= 0)
            return _least_squares_step(grouped, importance, planes, units)

        return alternate(grouped, importance, fitted)

    def project(self, scales: Tensor, upright: Tensor | None = None) -> Tensor:
        """See `Scheme.project`."""
        return torch.stack(tie_scales(*project_signs(*scales), upright))

    def parts(self, out_features: int, groups: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """See `Scheme.parts`."""
        return {"alpha": (torch.float16, [1, out_features, groups])}

    def store(self, scales: Tensor) -> dict[str, Tensor]:
        """See `Scheme.store`."""
        # The smaller one is rounded, so that the larger is exactly twice as large.
        return {"alpha": join_tied(scales).to(torch.float16)}

    def expand(self, stored: Mapping[str, Tensor]) -> Tensor:
        """See `Scheme.expand`."""
        return split_tied(stored["alpha"])

    def train_gradient(self, scales: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the step, handed to both scales: apart they would pull it astray."""
        units = torch.stack(tied_units(scales[0] + scales[1] >= 0))
        return units * (units * gradient).sum(0)


def tied_units(upright: Tensor) -> tuple[Tensor, Tensor]:
    """What alpha1 and alpha2 are in steps: 2 and −1 where upright, else 1 and −2."""
    return torch.where(upright, 2.0, 1.0), torch.where(upright, -1.0, -2.0)


def tie_scales(
    alpha1: Tensor, alpha2: Tensor, upright: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest scales of which the larger is twice the smaller.

    Args:
        alpha1: not negative, any shape.
        alpha2: not positive, the same shape.
        upright: where alpha1 is to be the larger; where it is when absent.
    """
    unit1, unit2 = tied_units(alpha1 + alpha2 >= 0 if upright is None else upright)
    step = (unit1 * alpha1 + unit2 * alpha2) / 5
    return unit1 * step, unit2 * step


def join_tied(scales: Tensor) -> Tensor:
    """Tied scales `[2, out, groups]` as their signed step d `[1, out, groups]`."""
    alpha1, alpha2 = scales
    return torch.where(alpha1 + alpha2 >= 0, -alpha2, -alpha1).unsqueeze(0)


def split_tied(step: Tensor) -> Tensor:
    """The inverse of `join_tied`: levels d·(−1, 0, 1, 2)."""
    positive, negative = step.clamp(min=0), step.clamp(max=0)
    return torch.cat((2 * positive - negative, 2 * negative - positive))


def _least_squares_step(
    grouped: Tensor, importance: Tensor, planes: Tensor, units: tuple[Tensor, Tensor]
) -> Tensor:
    """The tied scales with the least weighted square error for given planes and orientation."""
    unit = units[0] * planes[0] + units[1] * planes[1]
    weighted = unit * importance
    size = (weighted * unit).sum(-1, keepdim=True)
    step = (weighted * grouped).sum(-1, keepdim=True) / torch.where(size > 0, size, 1.0)
    return torch.stack(project_signs(units[0] * step, units[1] * step))


SCHEME = Tied()

"""Which scales a group may have, and how they are rounded and stored.

`plain`: alpha1 and alpha2, each a float16; `alpha2 <= 0 <= alpha1` (DB-LLM).

`tied`: one step d of either sign, a float16, with the levels −d, 0, d and 2d of GGUF's Q2_0: of the
two scales one is twice the other. They are tied from the start and at every step of training.

`offset`: a third number beta moves all four levels (`w = beta + alpha1·b1 + alpha2·b2`), which then
lie evenly around a centre: `centre ± outer` and `centre ± inner`. All three take 16 bits
(`scale_codes`).
"""

from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.levels import project_signs
from dbllm_cli.fdb.scale_codes import LARGEST_CENTRE, decode_spans, encode_spans

LevelKind = Literal["plain", "tied", "offset"]


class Spans(NamedTuple):
    """Levels with an offset: `centre ± outer` and `centre ± inner`, all of one shape."""

    centre: Tensor
    outer: Tensor
    inner: Tensor

    @classmethod
    def of(cls, alpha: Tensor) -> Self:
        """From alpha1, alpha2 and beta `[3, ...]`."""
        middle = (alpha[0] + alpha[1]) / 2
        return cls(alpha[2] + middle, (alpha[0] - alpha[1]) / 2, middle)

    @property
    def alpha(self) -> Tensor:
        """alpha1, alpha2 and beta `[3, ...]`, upright: `alpha1 + alpha2 >= 0`."""
        centre, outer, inner = self
        return torch.stack((outer + inner, inner - outer, centre - inner))

    def project(self) -> "Spans":
        """Each number brought into range: `0 <= inner <= outer`, a centre that a code reaches."""
        outer = self.outer.clamp(min=0)
        reach = LARGEST_CENTRE * outer
        centre = torch.minimum(torch.maximum(self.centre, -reach), reach)
        return Spans(centre, outer, torch.minimum(self.inner.clamp(min=0), outer))


def project_scales(alpha: Tensor, kind: LevelKind, upright: Tensor | None = None) -> Tensor:
    """Scales brought to what a group may have.

    Args:
        alpha: `[2 or 3, ...]`.
        kind: of the levels.
        upright: where alpha1 + alpha2 may not be negative, bool `[...]`; elsewhere not positive. As
            it is when absent.
    """
    if kind == "offset":
        allowed = Spans.of(alpha).project().alpha
    else:
        pair = project_signs(alpha[0], alpha[1])
        if kind == "tied":
            return torch.stack(tie_scales(*pair, upright))
        allowed = torch.stack(pair)
    return allowed if upright is None else _keep_orientation(allowed, upright)


def _keep_orientation(alpha: Tensor, upright: Tensor) -> Tensor:
    """The nearest scales whose sum alpha1 + alpha2 has not the other sign."""
    middle = alpha[0] + alpha[1]
    excess = torch.where(upright, middle.clamp(max=0), middle.clamp(min=0)) / 2
    return torch.cat((alpha[:2] - excess, alpha[2:]))


def round_scales(alpha: Tensor, kind: LevelKind) -> Tensor:
    """Scales projected and rounded to what is stored, as float16.

    Args:
        alpha: `[2 or 3, out, groups]`.
        kind: of the levels.

    Raises:
        StageFailedError: a scale is not finite in float16.
    """
    allowed = project_scales(alpha.to(torch.float32), kind)
    rounded = expand_scales(*stored_scales(allowed, kind))
    # A code would be finite whatever it stands for.
    if not (torch.isfinite(allowed.to(torch.float16)) & torch.isfinite(rounded)).all():
        raise StageFailedError(
            "a scale is not finite in float16", "lower the learning rates, or leave the layer out"
        )
    return rounded


def stored_scales(alpha: Tensor, kind: LevelKind) -> tuple[Tensor, Tensor | None]:
    """Scales as files hold them, and the exponents of the rows where they are coded.

    Args:
        alpha: `[2 or 3, out, groups]`, allowed ones.
        kind: of the levels.

    Returns:
        plain: float16 `[2, out, groups]`; tied: float16 `[1, out, groups]`; offset: codes, uint16
        `[1, out, groups]`, and int8 `[out]`.
    """
    if kind == "offset":
        codes, exponents = encode_spans(*Spans.of(alpha.to(torch.float32)))
        return codes.unsqueeze(0), exponents
    # The smaller one is rounded, so that the larger is exactly twice as large.
    return (join_tied(alpha) if kind == "tied" else alpha).to(torch.float16), None


def expand_scales(stored: Tensor, exponents: Tensor | None) -> Tensor:
    """The inverse of `stored_scales`: float16 `[2 or 3, out, groups]`; expanded ones unchanged."""
    if stored.dtype == torch.uint16:
        assert exponents is not None
        return Spans(*decode_spans(stored[0], exponents)).alpha.to(torch.float16)
    return split_tied(stored) if len(stored) == 1 else stored


def stored_scale_bits(alpha: Tensor, kind: LevelKind) -> int:
    """Bits of scales `[2 or 3, out, groups]` as files hold them."""
    _, rows, groups = alpha.shape
    numbers = {"plain": 2, "tied": 1, "offset": 1}[kind]
    return rows * groups * numbers * 16 + (rows * 8 if kind == "offset" else 0)


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


def join_tied(alpha: Tensor) -> Tensor:
    """Tied scales `[2, out, groups]` as their signed step d `[1, out, groups]`."""
    alpha1, alpha2 = alpha
    return torch.where(alpha1 + alpha2 >= 0, -alpha2, -alpha1).unsqueeze(0)


def split_tied(step: Tensor) -> Tensor:
    """The inverse of `join_tied`: levels d·(−1, 0, 1, 2)."""
    positive, negative = step.clamp(min=0), step.clamp(max=0)
    return torch.cat((2 * positive - negative, 2 * negative - positive))

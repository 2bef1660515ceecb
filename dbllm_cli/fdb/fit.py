"""Starting scales of a matrix: `paper`, `mse` and `als`.

Errors are weighted by the mean square of each input, the diagonal of XᵀX, so that they estimate
the error of the layer's output.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dbllm_cli.fdb.alternation import search_step, step_sizes
from dbllm_cli.fdb.groups import to_groups
from dbllm_cli.fdb.schemes import open_scheme

_CHUNK_WEIGHTS = 1 << 22
"""Weights fitted at once: bounds the work memory whatever the layer."""


def fit_scales(
    matrix: Tensor,
    group_size: int,
    method: str,
    input_weights: Tensor | None = None,
    levels: str = "plain",
) -> Tensor:
    """Scales of every group.

    Args:
        matrix: weights `[out, in]`.
        group_size: inputs that share their scales.
        method: `paper` (step max|w|/2), `mse` (best step by search, either orientation) or `als`
            (alternate nearest-level assignment and least squares).
        input_weights: importance of each input `[in]`, not negative; equal when absent.
        levels: the scheme of levels. `paper` and `mse` find tied ones, which are plain too.

    Returns:
        The scheme's expanded scales, float32 `[2 or 3, out, groups]`.
    """
    fits: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "paper": _fit_paper,
        "mse": _fit_mse,
        "als": open_scheme(levels).fit,
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


def _fit_paper(grouped: Tensor, importance: Tensor) -> Tensor:
    """INT2 with step s = max|w|/2: alpha1 = 2s, alpha2 = −s (DB-LLM, initialization)."""
    del importance
    step = step_sizes(grouped)
    return torch.stack((2 * step, -step))


def _fit_mse(grouped: Tensor, importance: Tensor) -> Tensor:
    return search_step(grouped, importance).scales

"""Error-compensated rounding onto the levels of FDB: `gptq`.

Columns are rounded in order, and the columns that follow take up the error of each, so that the
error of the layer's output is least (GPTQ, arXiv 2210.17323, with the four levels of DB-LLM for
every group of a row). The scales are then fitted once more to the layer's output.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.groups import group_count, to_groups
from dbllm_cli.fdb.levels import assign_planes
from dbllm_cli.fdb.quantized import QuantizedMatrix, latent_start
from dbllm_cli.fdb.schemes import open_scheme
from dbllm_cli.kernels import pack_planes

_DAMPING = 0.01
"""Added to the diagonal of XᵀX, as a share of its mean."""
_CHUNK_NUMBERS = 1 << 24
"""Numbers of the systems solved at once: bounds the work memory whatever the layer."""


class Compensated(NamedTuple):
    """A layer after error-compensated rounding.

    Attributes:
        quantized: planes and scales.
        latent: what each weight was when it was rounded, the errors before it taken up, drawn into
            the cell of its code; float32 `[out, in]`. Training goes on from here: from the full-
            precision weights it would have to find the compensation again.
    """

    quantized: QuantizedMatrix
    latent: Tensor


def quantize_compensated(
    matrix: Tensor, gram: Tensor, group_size: int, levels: str = "plain"
) -> Compensated:
    """Planes and scales of a layer, chosen for the error of its output.

    Args:
        matrix: weights, float32 `[out, in]`.
        gram: XᵀX over the calibration, tokens weighted, float32 `[in, in]`.
        group_size: inputs that share their scales.
        levels: the scheme of levels.

    Raises:
        StageFailedError: a scale is not finite in float16, or XᵀX has no inverse.
    """
    if not torch.isfinite(gram).all():
        raise StageFailedError("its inputs are not finite", "use --compute-dtype float32")
    damped = _damp(gram)
    planes, scales, rounded = _round_columns(matrix, _inverse_root(damped), group_size, levels)
    scales = _refit_scales(matrix, damped, planes, scales, group_size, levels)
    quantized = QuantizedMatrix(pack_planes(planes), scales, matrix.shape[-1], group_size, levels)
    return Compensated(quantized, latent_start(quantized, rounded))


def _damp(gram: Tensor) -> Tensor:
    diagonal = gram.diagonal()
    # An input that is always zero would make the matrix singular.
    return gram + (_DAMPING * diagonal.mean()).clamp(min=1e-12) * torch.eye(
        len(gram), device=gram.device
    )


def _inverse_root(gram: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = gram⁻¹: row j holds how the columns after j follow it."""
    # Apple's GPUs have no float64.
    wide = (gram.cpu() if gram.device.type == "mps" else gram).double()
    lower, failed = torch.linalg.cholesky_ex(wide)
    upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or failed_too:
        raise StageFailedError(
            "XᵀX of its inputs can't be inverted", "use more samples, or --method als"
        )
    return cast(Tensor, upper.to(gram.device, torch.float32))


def _round_columns(
    matrix: Tensor, root: Tensor, group_size: int, levels: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Planes, bool `[2, out, in]`, scales `[2 or 3, out, groups]`, and what was rounded."""
    rest = matrix.clone()
    in_features = matrix.shape[-1]
    planes = torch.empty(2, *matrix.shape, dtype=torch.bool, device=matrix.device)
    found = []
    for first in range(0, in_features, group_size):
        last = min(first + group_size, in_features)
        group, own = rest[:, first:last], root[first:last, first:last]
        # What an error costs after the columns that follow have taken up their part.
        importance = own.diagonal().square().reciprocal()
        scales = fit_scales(group, last - first, "als", importance, levels)
        found.append(scales)
        errors = _round_group(group, own, scales, planes[:, :, first:last])
        rest[:, last:] -= errors @ root[first:last, last:]
    return planes, torch.cat(found, dim=-1), rest


def _round_group(group: Tensor, root: Tensor, scales: Tensor, planes: Tensor) -> Tensor:
    """Round a group's columns `[out, n]` in place; their errors, in units of the root's diagonal.

    Args:
        group: weights so far; each column becomes what it was when it was rounded.
        root: the group's part of the inverse root `[n, n]`.
        scales: `[2 or 3, out, 1]`.
        planes: where the planes go, bool `[2, out, n]`.
    """
    errors = torch.empty_like(group)
    for column in range(group.shape[-1]):
        weights = group[:, column : column + 1]
        codes = assign_planes(weights, scales)
        planes[:, :, column : column + 1] = codes
        difference = weights - (scales[:2] * codes).sum(0) - scales[2:].sum(0)
        errors[:, column : column + 1] = difference / root[column, column]
        group[:, column + 1 :] -= errors[:, column : column + 1] * root[column, column + 1 :]
    return errors


def _refit_scales(
    matrix: Tensor,
    gram: Tensor,
    planes: Tensor,
    scales: Tensor,
    group_size: int,
    levels: str,
) -> Tensor:
    """Scales with the least output error for given planes: one system for all groups of a row.

    A row keeps the scales it had where signs or rounding make the new ones worse.

    Args:
        matrix: weights `[out, in]`.
        gram: damped XᵀX `[in, in]`.
        planes: bool `[2, out, in]`.
        scales: `[2 or 3, out, groups]`.
        group_size: inputs that share their scales.
        levels: the scheme of levels.

    Returns:
        float16 `[2 or 3, out, groups]`, rounded to what is stored.
    """
    width = group_count(matrix.shape[-1], group_size) * group_size
    missing = width - matrix.shape[-1]
    gram = pad(gram, (0, missing, 0, missing))
    rows = max(1, _CHUNK_NUMBERS // (len(scales) * width * scales.shape[-1]))
    refitted = [
        _refit_rows(pad(part, (0, missing)), to_groups(own, group_size), old, gram, levels)
        for part, own, old in zip(
            matrix.split(rows), planes.split(rows, dim=1), scales.split(rows, dim=1), strict=True
        )
    ]
    return torch.cat(refitted, dim=1)


def _refit_rows(
    matrix: Tensor, planes: Tensor, scales: Tensor, gram: Tensor, levels: str
) -> Tensor:
    """As `_refit_scales`, for grouped planes `[2, out, groups, group_size]`."""
    _, rows, groups, size = planes.shape
    numbers, width = len(scales), groups * size
    unknowns = numbers * groups
    # The offset is the scale of a plane of ones.
    whole = torch.cat((planes, torch.ones_like(planes[: numbers - 2])))
    own = whole.to(torch.float32).permute(2, 3, 1, 0)  # [groups, size, rows, numbers]
    by_group = gram.reshape(width, groups, size).transpose(0, 1)
    # What each plane of each group adds to XᵀX times the row: [rows, width, numbers · groups].
    weighed = torch.matmul(by_group, own.flatten(2)).reshape(groups, width, rows, numbers)
    weighed = weighed.permute(2, 1, 3, 0).reshape(rows, width, unknowns)
    system = torch.matmul(own.permute(2, 0, 3, 1), weighed.reshape(rows, groups, size, unknowns))
    system = system.transpose(1, 2).reshape(rows, unknowns, unknowns)
    target = torch.matmul(weighed.mT, matrix.unsqueeze(-1))
    # A plane that is empty would make its system singular.
    damping = (1e-6 * system.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp(min=1e-12)
    damped = system + damping[:, None, None] * torch.eye(unknowns, device=system.device)
    solved = torch.linalg.solve(damped, target).reshape(rows, numbers, groups).transpose(0, 1)
    scheme = open_scheme(levels)
    found = scheme.project(solved)
    fits = found.abs().amax((0, -1)) <= torch.finfo(torch.float16).max
    found = scheme.round(torch.where(fits.unsqueeze(-1), found, scales))
    rounded = scheme.round(scales)
    errors = [_relative_output_error(system, target, each) for each in (found, rounded)]
    return torch.where((errors[0] < errors[1]).unsqueeze(-1), found, rounded)


def _relative_output_error(system: Tensor, target: Tensor, scales: Tensor) -> Tensor:
    """Square error of each row's output, less what no scales change `[out]`."""
    flat = scales.to(torch.float32).transpose(0, 1).flatten(1).unsqueeze(-1)
    error: Tensor = (flat.mT @ system @ flat - 2 * flat.mT @ target).flatten()
    return error

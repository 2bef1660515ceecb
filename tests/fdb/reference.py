"""The method written a second time, weight by weight in float64, to compare with."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CODES = ((0, 0), (0, 1), (1, 0), (1, 1))


def brute_force_value(weight: float, alpha1: float, alpha2: float) -> float:
    """Distance of a weight to the nearest of the four levels."""
    return min(abs(weight - (alpha1 * b1 + alpha2 * b2)) for b1, b2 in CODES)


def paper_planes(weight: float, alpha1: float, alpha2: float) -> tuple[int, int]:
    """DB-LLM's rule, for alpha1 + alpha2 > 0, with H(0) = 1."""
    b1 = int(weight - (alpha1 + alpha2) / 2 >= 0)
    b2 = int(-(weight - alpha1 * b1 - alpha2 / 2) >= 0)
    return b1, b2


def dense(planes: Array, alpha: Array, group_size: int) -> Array:
    """Planes `[2, out, in]` and scales `[2 or 3, out, groups]` as a matrix."""
    _, rows, columns = planes.shape
    result = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            group = column // group_size
            result[row, column] = (
                alpha[0, row, group] * planes[0, row, column]
                + alpha[1, row, group] * planes[1, row, column]
                + alpha[2:, row, group].sum()
            )
    return result


def constrained_scales(weights: Array, importance: Array, planes: Array) -> tuple[float, Array]:
    """Least weighted error of `alpha2 <= 0 <= alpha1` for planes `[2, n]`, and such scales."""
    root = np.sqrt(importance)
    columns = (planes * root).T
    target = weights * root
    best_error, best = float((target**2).sum()), np.zeros(2)
    for kept in ((0, 1), (0,), (1,)):
        alpha = np.zeros(2)
        alpha[list(kept)] = np.linalg.lstsq(columns[:, list(kept)], target, rcond=None)[0]
        error = float(((columns @ alpha - target) ** 2).sum())
        if alpha[0] >= 0 >= alpha[1] and error < best_error:
            best_error, best = error, alpha
    return best_error, best

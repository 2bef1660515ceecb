"""Latent weights rounded to levels, and the gradients back, against arithmetic in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbllm_cli.kernels import can_round_latents, latent_gradients, latent_levels
from tests.kernels.layers import normal

pytestmark = pytest.mark.usefixtures("instruction_set")


def _scales(rows: int, groups: int, offset: bool = False) -> Tensor:
    """Of both orientations; one group in five has none. Sums of them are exact in float32."""
    alpha = (normal(3 if offset else 2, rows, groups, seed=1) * 1024).round() / 1024
    alpha[0].abs_()
    alpha[1].abs_().neg_()
    alive = torch.randint(5, (rows, groups), generator=torch.Generator().manual_seed(2)) > 0
    return alpha * alive


def _levels(alpha1: float, alpha2: float, beta: float = 0) -> list[tuple[float, int, int]]:
    """Value, b1 and b2 of the levels, ascending."""
    levels = [(0.0, 0, 0), (alpha1, 1, 0), (alpha2, 0, 1), (alpha1 + alpha2, 1, 1)]
    return sorted((value + beta, b1, b2) for value, b1, b2 in levels)


def _expected(
    latent: Tensor, alpha: Tensor, cells: Tensor, grad: Tensor, size: int
) -> tuple[np.ndarray, ...]:
    w, g, scales, parts = (x.double().numpy() for x in (latent, grad, alpha, cells))
    dense, to_latent, to_alpha = np.zeros_like(w), np.zeros_like(w), np.zeros_like(scales)
    for row, column in np.ndindex(*w.shape):
        group = column // size
        levels = _levels(*parts[:, row, group])
        _, b1, b2 = min(levels, key=lambda level: abs(level[0] - w[row, column]))
        alpha1, alpha2, *beta = scales[:, row, group]
        dense[row, column] = alpha1 * b1 + alpha2 * b2 + sum(beta)
        alive = scales[:, row, group].any()
        to_alpha[:, row, group] += g[row, column] * np.array([b1, b2, 1])[: len(scales)] * alive
        (low, *_), (lower, *_), (upper, *_), (high, *_) = levels
        inside = low - (lower - low) / 2 <= w[row, column] <= high + (high - upper) / 2
        to_latent[row, column] = g[row, column] * inside
    return dense, to_latent, to_alpha


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 150),
    size=st.sampled_from([8, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    offset=st.booleans(),
    moved=st.booleans(),
)
def test_levels_and_gradients_are_those_of_the_formula(
    rows: int, columns: int, size: int, dtype: torch.dtype, offset: bool, moved: bool
) -> None:
    latent, grad = normal(rows, columns) * 1.5, normal(rows, columns, seed=3, dtype=dtype)
    cells = _scales(rows, -(-columns // size), offset)
    # Either may have become the larger one since.
    alpha = cells * torch.tensor([1.5, 0.5, -2.0])[: len(cells), None, None] if moved else cells
    assert can_round_latents(latent, alpha, dtype)
    dense, to_latent, to_alpha = _expected(latent, alpha, cells, grad, size)
    found = latent_levels(latent, alpha, cells, size, dtype)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.double(), dense, rtol=2**-8 if dtype.itemsize == 2 else 1e-6)
    gradients = latent_gradients(grad, latent, alpha, cells, size)
    np.testing.assert_array_equal(gradients[0].double(), to_latent)
    np.testing.assert_allclose(gradients[1].double(), to_alpha, rtol=1e-5, atol=1e-4)


def test_weights_on_a_border_go_where_the_planes_say() -> None:
    latent = torch.tensor([[-0.5, 0.5, 1.5, -1.5]])
    upright = torch.tensor([[[2.0]], [[-1.0]]])  # levels -1, 0, 1, 2
    mirrored = torch.tensor([[[1.0]], [[-2.0]]])  # levels -2, -1, 0, 1
    assert latent_levels(latent, upright, upright, 64, torch.float32).tolist() == [[-1, 1, 1, -1]]
    assert latent_levels(latent, mirrored, mirrored, 64, torch.float32).tolist() == [[0, 0, 1, -2]]


def test_one_thread_and_two_give_the_same_bytes() -> None:
    latent, grad, alpha = normal(300, 1000), normal(300, 1000, seed=1), _scales(300, 16)
    expected = (latent_levels(latent, alpha, alpha, 64, torch.float32),)
    expected += latent_gradients(grad, latent, alpha, alpha, 64)
    torch.set_num_threads(2)
    try:
        found = (latent_levels(latent, alpha, alpha, 64, torch.float32),)
        found += latent_gradients(grad, latent, alpha, alpha, 64)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_dtypes_are_left_to_torch() -> None:
    latent, alpha = normal(4, 64), _scales(4, 1)
    assert can_round_latents(latent, alpha, torch.float32)
    assert not can_round_latents(latent, alpha, torch.float16)
    assert not can_round_latents(latent.bfloat16(), alpha, torch.bfloat16)

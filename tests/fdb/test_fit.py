import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbllm_cli.fdb import fit
from dbllm_cli.fdb.alternation import least_squares_scales
from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.quantized import quantize_matrix
from tests.fdb.reference import constrained_scales


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _error(
    matrix: Tensor, alpha: Tensor, group_size: int, input_weights: Tensor | None = None
) -> float:
    """Relative weighted square error with every weight at its nearest level, in float64."""
    exact = matrix.double()
    importance = torch.ones(matrix.shape[-1]).double() if input_weights is None else input_weights
    scales = alpha.double().repeat_interleave(group_size, -1)[..., : matrix.shape[-1]]
    zero = torch.zeros_like(scales[0])
    levels = torch.stack((zero, scales[0], scales[1], scales[0] + scales[1])) + scales[2:].sum(0)
    nearest = (levels - exact).abs().amin(0)
    return float((nearest**2 * importance).sum() / (exact**2 * importance).sum())


@pytest.mark.parametrize(("method", "expected"), [("paper", 0.170), ("mse", 0.124), ("als", 0.115)])
def test_the_error_on_unit_normal_weights_is_the_known_one(method: str, expected: float) -> None:
    matrix = _normal(256, 1024)
    alpha = fit_scales(matrix, 64, method)
    assert _error(matrix, alpha, 64) == pytest.approx(expected, abs=0.0025)


def test_the_paper_s_start_is_int2_with_half_the_largest_weight_as_step() -> None:
    matrix = _normal(3, 172)
    alpha = fit_scales(matrix, 64, "paper")
    for group, columns in enumerate((slice(0, 64), slice(64, 128), slice(128, 172))):
        step = matrix[:, columns].abs().amax(-1) / 2
        assert torch.allclose(alpha[0, :, group], 2 * step)
        assert torch.allclose(alpha[1, :, group], -step)


def test_tied_scales_are_fitted_as_pairs_of_one_and_two_steps() -> None:
    matrix = _normal(256, 1024)
    alpha = fit_scales(matrix, 64, "als", levels="tied")
    sizes = alpha.abs()
    assert torch.allclose(sizes.amax(0), 2 * sizes.amin(0), rtol=1e-5)
    error = _error(matrix, alpha, 64)
    assert error == pytest.approx(0.1225, abs=0.0015)
    moved = [_error(matrix, alpha * factor, 64) for factor in (0.99, 1.01)]
    assert error < min(moved)
    weights = _normal(1024, seed=1).abs().double()
    weighted = fit_scales(matrix, 64, "als", weights.float(), "tied")
    assert _error(matrix, weighted, 64, weights) < _error(matrix, alpha, 64, weights)


def test_an_offset_lowers_the_error_of_normal_weights_to_the_known_one() -> None:
    matrix = _normal(256, 1024)
    alpha = fit_scales(matrix, 64, "als", levels="offset")
    error = _error(matrix, alpha, 64)
    assert error == pytest.approx(0.1005, abs=0.0015)
    for scale in range(3):
        for factor in (0.99, 1.01):
            moved = alpha.clone()
            moved[scale] *= factor
            assert error < _error(matrix, moved, 64)
    weights = _normal(1024, seed=1).abs().double()
    weighted = fit_scales(matrix, 64, "als", weights.float(), "offset")
    assert _error(matrix, weighted, 64, weights) < _error(matrix, alpha, 64, weights)


def test_four_levels_around_any_centre_are_found_again() -> None:
    centre, outer, inner = torch.tensor(0.3), torch.tensor(1.0), torch.tensor(0.25)
    levels = torch.stack((centre - outer, centre - inner, centre + inner, centre + outer))
    matrix = levels.repeat(8, 16)
    alpha = fit_scales(matrix, 64, "als", levels="offset")
    assert _error(matrix, alpha, 64) < 1e-10
    assert torch.allclose(alpha[0] - alpha[1], 2 * outer)
    assert torch.allclose(alpha[2] + (alpha[0] + alpha[1]) / 2, centre)


@pytest.mark.parametrize("weight", [0.0, 0.7, -3.0])
def test_a_group_of_equal_weights_keeps_its_sign_and_size_with_an_offset(weight: float) -> None:
    matrix = torch.full((2, 64), weight)
    quantized = quantize_matrix(
        matrix, fit_scales(matrix, 64, "als", levels="offset"), 64, "offset"
    )
    assert torch.allclose(quantized.dense(), matrix, rtol=0.13)


@pytest.mark.parametrize("levels", ["plain", "tied", "offset"])
def test_a_group_whose_inputs_were_always_zero_is_fitted_as_if_they_weighed_alike(
    levels: str,
) -> None:
    matrix, importance = _normal(4, 128), torch.ones(128)
    importance[64:] = 0
    alpha = fit_scales(matrix, 64, "als", importance, levels)
    assert torch.equal(alpha, fit_scales(matrix, 64, "als", None, levels))


@pytest.mark.parametrize("method", ["mse", "als"])
def test_both_orientations_are_tried(method: str) -> None:
    lopsided = torch.cat((_normal(1, 64).abs() * 2 - 0.3, -(_normal(1, 64).abs() * 2 - 0.3)))
    alpha1, alpha2 = fit_scales(lopsided, 64, method)
    assert float(alpha1[0] + alpha2[0]) > 0
    assert float(alpha1[1] + alpha2[1]) < 0
    assert torch.allclose(alpha1[0], -alpha2[1], rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["paper", "mse", "als"]),
    st.sampled_from([8, 16, 64, 128]),
    st.integers(1, 200),
    st.integers(0, 2**31),
)
def test_a_group_is_fitted_alone_whatever_its_size_and_length(
    method: str, group_size: int, inputs: int, seed: int
) -> None:
    matrix = _normal(2, inputs, seed=seed)
    alpha = fit_scales(matrix, group_size, method)
    assert alpha.shape == (2, 2, math.ceil(inputs / group_size))
    assert (alpha[0] >= 0).all()
    assert (alpha[1] <= 0).all()
    last = matrix[:, (alpha.shape[-1] - 1) * group_size :]
    alone = fit_scales(last, last.shape[-1], method)
    assert torch.allclose(alpha[..., -1:], alone, rtol=1e-4, atol=1e-6)


def test_als_is_never_worse_than_mse_and_mse_never_than_paper() -> None:
    matrix = _normal(8, 172, seed=3)
    errors = [_error(matrix, fit_scales(matrix, 64, m), 64) for m in ("paper", "mse", "als")]
    assert errors[0] > errors[1] > errors[2]


def test_weighted_als_lowers_the_weighted_error() -> None:
    matrix = _normal(16, 256, seed=1)
    importance = _normal(256, seed=2).mul(2).exp()
    weighted = fit_scales(matrix, 64, "als", importance)
    plain = fit_scales(matrix, 64, "als")
    assert _error(matrix, weighted, 64, importance) < 0.9 * _error(matrix, plain, 64, importance)
    assert _error(matrix, weighted, 64) > _error(matrix, plain, 64)


def test_the_size_of_the_importance_does_not_matter() -> None:
    matrix, importance = _normal(4, 128), _normal(128, seed=5).exp()
    small = fit_scales(matrix, 64, "als", importance * 2.0**-20)
    assert torch.equal(small, fit_scales(matrix, 64, "als", importance))


@pytest.mark.parametrize("method", ["paper", "mse", "als"])
def test_an_all_zero_group_gets_zero_scales_and_harms_no_other(method: str) -> None:
    matrix = _normal(2, 128)
    matrix[0, :64] = 0
    alpha = fit_scales(matrix, 64, method)
    assert not alpha[:, 0, 0].any()
    assert torch.isfinite(alpha).all()
    assert torch.equal(alpha[:, 1], fit_scales(matrix[1:], 64, method)[:, 0])


@pytest.mark.parametrize("method", ["mse", "als"])
def test_inputs_that_never_fire_leave_the_scales_finite(method: str) -> None:
    importance = torch.ones(128)
    importance[:64] = 0
    assert torch.isfinite(fit_scales(_normal(2, 128), 64, method, importance)).all()


def test_fitting_in_chunks_of_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = _normal(7, 64)
    whole = fit_scales(matrix, 64, "als")
    monkeypatch.setattr(fit, "_CHUNK_WEIGHTS", 3 * 64)
    assert torch.equal(fit_scales(matrix, 64, "als"), whole)


def test_bfloat16_weights_are_fitted_in_float32() -> None:
    matrix = _normal(4, 64).bfloat16()
    alpha = fit_scales(matrix, 64, "als")
    assert alpha.dtype == torch.float32
    assert torch.equal(alpha, fit_scales(matrix.float(), 64, "als"))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 12), st.integers(0, 2**31), st.floats(-1.5, 1.5))
def test_least_squares_scales_have_the_least_error_with_their_signs(
    size: int, seed: int, shift: float
) -> None:
    draw = np.random.default_rng(seed)
    weights = draw.normal(size=size) + shift
    importance = draw.uniform(0.1, 2, size)
    planes = draw.integers(0, 2, (2, size)).astype(np.float64)
    alpha1, alpha2 = least_squares_scales(
        torch.tensor(weights),
        torch.tensor(importance),
        torch.tensor(planes).bool(),
    )
    alpha = np.array([float(alpha1), float(alpha2)])
    assert alpha[0] >= 0 >= alpha[1]
    error = float((importance * (alpha @ planes - weights) ** 2).sum())
    assert error == pytest.approx(constrained_scales(weights, importance, planes)[0], abs=1e-9)


def test_least_squares_scales_equal_numpy_s_where_the_signs_are_right() -> None:
    weights = np.array([-1.1, -0.9, 0.1, 0.9, 1.2, 2.1, 1.9])
    planes = np.array([[0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0]], dtype=np.float64)
    importance = np.array([1.0, 2.0, 1.0, 0.5, 1.0, 3.0, 1.0])
    root = np.sqrt(importance)
    expected = np.linalg.lstsq((planes * root).T, weights * root, rcond=None)[0]
    assert expected[0] > 0 > expected[1]
    scales = least_squares_scales(
        torch.tensor(weights), torch.tensor(importance), torch.tensor(planes).bool()
    )
    assert [float(scale) for scale in scales] == pytest.approx(expected.tolist(), rel=1e-9)

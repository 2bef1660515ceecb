import numpy as np
import pytest
import torch
from torch import Tensor

from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.compensation import quantize_compensated
from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.quantized import quantize_matrix


def _layer(inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and inputs `[tokens, in]` that follow each other."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    tokens = torch.randn(4 * inputs, inputs, generator=generator)
    # A few directions hold most of what there is, as in a language model.
    tokens = (tokens / torch.arange(1, inputs + 1).sqrt()) @ directions
    return torch.randn(outputs, inputs, generator=generator), tokens


def _output_error(dense: Tensor, matrix: Tensor, tokens: Tensor) -> float:
    exact = tokens.double() @ matrix.double().T
    return float((tokens.double() @ dense.double().T - exact).norm() / exact.norm())


@pytest.mark.parametrize("levels", ["plain", "offset"])
@pytest.mark.parametrize(("inputs", "group_size"), [(128, 64), (172, 64), (96, 32), (40, 64)])
def test_the_output_is_nearer_than_that_of_weights_rounded_one_by_one(
    inputs: int, group_size: int, levels: str
) -> None:
    matrix, tokens = _layer(inputs, 48)
    compensated = quantize_compensated(matrix, tokens.T @ tokens, group_size, levels).quantized
    alpha = fit_scales(matrix, group_size, "als", tokens.square().mean(0), levels)
    plain = quantize_matrix(matrix, alpha, group_size, levels)
    errors = [_output_error(q.dense(), matrix, tokens) for q in (compensated, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_inputs_that_do_not_follow_each_other_leave_nothing_to_compensate() -> None:
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.linspace(0.1, 2, 64)
    found = quantize_compensated(matrix, torch.diag(importance), 64).quantized
    alpha = fit_scales(matrix, 64, "als", importance + 0.01 * importance.mean())
    plain = quantize_matrix(matrix, alpha, 64)
    weighted = [((q.dense() - matrix).square() * importance).sum() for q in (found, plain)]
    assert float(weighted[0]) == pytest.approx(float(weighted[1]), rel=0.02)


def _compensated_columns(matrix: Tensor, gram: Tensor, alpha: Tensor) -> np.ndarray:
    """What every column was when it was rounded, by least squares anew for each, in float64."""
    root = np.linalg.cholesky(gram.double().numpy()).T
    exact = matrix.double().numpy()
    levels = alpha.double().numpy()
    so_far, seen = exact.copy(), exact.copy()
    for column in range(exact.shape[1]):
        # The free columns take up what the rounded ones before them lack.
        lacking = (exact[:, :column] - so_far[:, :column]) @ root[:, :column].T
        free = np.linalg.lstsq(root[:, column:], lacking.T, rcond=None)[0].T
        seen[:, column] = exact[:, column] + free[:, 0]
        for row in range(len(exact)):
            first, second = levels[:, row, 0]
            values = np.array([0, first, second, first + second])
            nearest = np.abs(values - seen[row, column]).argmin()
            so_far[row, column] = values[nearest]
    return seen


@pytest.mark.parametrize("levels", ["plain", "offset"])
def test_latent_weights_have_the_stored_codes(levels: str) -> None:
    matrix, tokens = _layer(100, 12)
    quantized, latent = quantize_compensated(matrix, tokens.T @ tokens, 32, levels)
    again = quantize_matrix(latent, quantized.scales.float(), 32, levels)
    assert torch.equal(again.weight, quantized.weight)
    assert torch.equal(again.scales, quantized.scales)


def test_latent_weights_are_what_was_rounded() -> None:
    matrix, tokens = _layer(24, 8)
    gram = tokens.T @ tokens / len(tokens)
    latent = quantize_compensated(matrix, gram, 24).latent
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(24)
    inverse = np.linalg.inv(damped.double().numpy())
    cost = 1 / np.square(np.diagonal(np.linalg.cholesky(inverse)))
    alpha = fit_scales(matrix, 24, "als", torch.from_numpy(cost).float())
    expected = _compensated_columns(matrix, damped, alpha)
    apart = np.abs(latent.double().numpy() - expected)
    # Some are drawn into their cells, whose borders moved when the scales were fitted once more.
    assert (apart < 1e-4).mean() > 0.8
    assert (np.abs(matrix.double().numpy() - expected) < 1e-4).mean() < 0.2


def _best_scales(matrix: Tensor, planes: Tensor, gram: Tensor, group_size: int) -> np.ndarray:
    """Least output error of each row over all scales of any sign, by dense algebra in float64."""
    root = np.linalg.cholesky(gram.double().numpy()).T
    outputs, inputs = matrix.shape
    groups = -(-inputs // group_size)
    errors = []
    for row in range(outputs):
        scales = len(planes)
        design = np.zeros((inputs, scales * groups))
        for column in range(inputs):
            for plane in range(scales):
                at = scales * (column // group_size) + plane
                design[column, at] = planes[plane, row, column]
        target = root @ matrix[row].double().numpy()
        found = np.linalg.lstsq(root @ design, target, rcond=None)[0]
        errors.append(np.square(root @ design @ found - target).sum())
    return np.array(errors)


@pytest.mark.parametrize("levels", ["plain", "offset"])
def test_no_other_scales_serve_the_planes_better(levels: str) -> None:
    matrix, tokens = _layer(100, 12)
    gram = tokens.T @ tokens / len(tokens)
    found = quantize_compensated(matrix, gram, 32, levels).quantized
    bits = np.unpackbits(found.weight.numpy(), axis=-1, bitorder="little")[..., :100]
    if levels == "offset":
        bits = np.concatenate((bits, np.ones_like(bits[:1])))
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(100)
    best = _best_scales(matrix, torch.from_numpy(bits), damped, 32)
    difference = (found.dense().double() - matrix.double()).numpy()
    errors = np.einsum("oi,ij,oj->o", difference, damped.double().numpy(), difference)
    # Scales are rounded, to float16 or codes, and the signs of a few are held.
    assert (errors <= (1.02 if levels == "plain" else 1.1) * best).mean() > 0.8
    assert (errors >= best * (1 - 1e-3)).all()


def test_scales_keep_their_signs_and_padding_is_zero() -> None:
    matrix, tokens = _layer(172, 20)
    found = quantize_compensated(matrix, tokens.T @ tokens, 64).quantized
    assert (found.scales[0] >= 0).all()
    assert (found.scales[1] <= 0).all()
    assert found.scales.dtype == torch.float16
    assert not (found.weight[..., -1] >> 4).any()


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    matrix, tokens = _layer(64, 8)
    tokens[:, 5] = 0
    found = quantize_compensated(matrix, tokens.T @ tokens, 64).quantized
    assert found.dense().isfinite().all()


def test_equal_inputs_give_equal_bytes() -> None:
    matrix, tokens = _layer(96, 40)
    found = (quantize_compensated(matrix, tokens.T @ tokens, 32) for _ in range(2))
    (first, latent), (second, same) = found
    assert torch.equal(latent, same)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.scales, second.scales)


@pytest.mark.parametrize("size", [0.0, 1e-12])
def test_rows_of_zeros_or_beneath_float16_become_zeros(size: float) -> None:
    matrix, tokens = _layer(96, 8)
    matrix[2] *= size
    found = quantize_compensated(matrix, tokens.T @ tokens, 32).quantized
    assert not found.dense()[2].any()
    assert found.dense()[3].any()
    assert not quantize_compensated(size * matrix, tokens.T @ tokens, 32).quantized.dense()[2].any()


def test_inputs_that_are_not_finite_are_an_error_of_their_own() -> None:
    matrix, tokens = _layer(64, 8)
    tokens[3, 5] = torch.nan
    with pytest.raises(StageFailedError, match="inputs are not finite"):
        quantize_compensated(matrix, tokens.T @ tokens, 64)

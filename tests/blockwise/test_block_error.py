import pytest
import torch
from torch import Tensor

from dbllm_cli.blockwise.block_error import (
    ErrorMetric,
    Sensitivity,
    error_metric,
    relative_token_error,
)


def test_the_relative_error_is_the_mean_of_each_token_s_error_over_its_own_size() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 5, 8, generator=generator)
    target[:, 0] *= 1000
    output = target + torch.randn(2, 5, 8, generator=generator)
    o, t = output.double(), target.double()
    expected = sum(
        float(((o[s, i] - t[s, i]) ** 2).sum() / (t[s, i] ** 2).sum())
        for s in range(2)
        for i in range(5)
    )
    assert float(relative_token_error(output, target)) == pytest.approx(expected / 10, rel=1e-4)


def test_the_relative_error_of_bfloat16_outputs_is_summed_in_float32() -> None:
    target = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    error = relative_token_error(target * 1.5, target)
    assert error.dtype == torch.float32
    assert float(error) == pytest.approx(0.25, rel=2e-2)


def test_a_token_of_zeros_does_not_make_the_relative_error_infinite() -> None:
    assert torch.isfinite(relative_token_error(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))


def _not_negative(size: int) -> Tensor:
    factor = torch.randn(
        size, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    return factor @ factor.T


def test_the_metric_is_a_power_of_the_matrix_with_eigenvalues_around_one() -> None:
    matrix = _not_negative(5)
    sensitivity = Sensitivity(matrix, torch.ones(3))
    assert torch.allclose(
        error_metric(sensitivity, 0.0, 0.5).directions, torch.eye(5, dtype=torch.float64)
    )
    whole = error_metric(sensitivity, 1.0, 0.5).directions
    assert torch.allclose(whole, matrix / matrix.trace() * 5)
    root = error_metric(sensitivity, 0.5, 1.0).directions
    assert float(root.trace()) == pytest.approx(5)
    squared = root @ root
    assert torch.allclose(squared, matrix * (squared.trace() / matrix.trace()))


def test_positions_count_by_the_power_of_their_sensitivity_and_once_on_average() -> None:
    sensitivity = Sensitivity(_not_negative(5), torch.tensor([1600.0, 4.0, 1.0, 1.0]))
    found = error_metric(sensitivity, 0.1, 0.5).positions
    assert torch.allclose(found, torch.tensor([40.0, 2.0, 1.0, 1.0]) / 11)


def test_no_sensitivity_at_all_weighs_all_errors_alike() -> None:
    metric = error_metric(Sensitivity(torch.zeros(3, 3), torch.zeros(4)), 0.5, 0.5)
    assert torch.allclose(metric.directions, torch.eye(3))
    assert torch.allclose(metric.positions, torch.ones(4))


def test_a_metric_weighs_the_directions_and_the_positions_of_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 10, 4, generator=generator, dtype=torch.float64)
    directions, positions = _not_negative(4), torch.rand(10, generator=generator)
    expected = 0.0
    for sequence in range(3):
        for token in range(10):
            exact = target[sequence, token]
            error = output[sequence, token] - exact
            weighed = sum(
                float(error[i] * directions[i, j] * error[j]) for i in range(4) for j in range(4)
            )
            expected += float(positions[token]) * weighed / float(exact @ exact)
    found = relative_token_error(output, target, ErrorMetric(directions.float(), positions))
    assert float(found) == pytest.approx(expected / 30, rel=1e-4)

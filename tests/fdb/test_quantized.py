import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.quantized import (
    PlaneCounts,
    QuantizedMatrix,
    count_planes,
    quantize_matrix,
    stored_bits,
)
from dbllm_cli.kernels import unpack_planes
from tests.fdb.reference import brute_force_value, dense


def _matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


_EACH_KIND = pytest.mark.parametrize("levels", ["plain", "tied", "offset"])


def _quantized(matrix: Tensor, group_size: int = 64, levels: str = "plain") -> QuantizedMatrix:
    alpha = fit_scales(matrix, group_size, "als", levels=levels)
    return quantize_matrix(matrix, alpha, group_size, levels)


@_EACH_KIND
@pytest.mark.parametrize(("inputs", "group_size"), [(128, 64), (172, 64), (13, 8), (172, 128)])
def test_the_dense_matrix_is_the_sum_of_scaled_planes_and_the_offset(
    inputs: int, group_size: int, levels: str
) -> None:
    quantized = _quantized(_matrix(3, inputs), group_size, levels)
    bits = np.unpackbits(quantized.weight.numpy(), axis=-1, bitorder="little")[..., :inputs]
    expected = dense(bits.astype(np.float64), quantized.scales.double().numpy(), group_size)
    assert np.allclose(quantized.dense().double().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_scales_are_rounded_to_float16_before_the_planes_are_derived() -> None:
    # Between the border of the scale given (0.50012) and that of the rounded scale (0.5).
    weight, scale = 0.50006, 1.00024
    assert float(torch.tensor(scale).half()) == 1.0
    alpha = torch.tensor([[[scale]], [[-3.0]]])
    quantized = quantize_matrix(torch.full((1, 8), weight), alpha, 8)
    assert quantized.scales.dtype == torch.float16
    assert float(quantized.dense()[0, 0]) == 1.0


@_EACH_KIND
def test_every_weight_is_at_the_level_nearest_under_the_stored_scales(levels: str) -> None:
    matrix = _matrix(4, 172)
    quantized = _quantized(matrix, levels=levels)
    alpha = quantized.scales.double()
    distances = (quantized.dense().double() - matrix.double()).abs()
    for row, column in ((r, c) for r in range(4) for c in range(172)):
        scale1, scale2, *beta = alpha[:, row, column // 64].tolist()
        nearest = brute_force_value(float(matrix[row, column]) - sum(beta), scale1, scale2)
        assert float(distances[row, column]) == pytest.approx(nearest, abs=1e-6)


@_EACH_KIND
def test_an_all_zero_group_stays_zero(levels: str) -> None:
    matrix = _matrix(2, 128)
    matrix[1, 64:] = 0
    quantized = _quantized(matrix, levels=levels)
    assert not quantized.dense()[1, 64:].any()
    assert not quantized.weight[:, 1, 8:].any()


@_EACH_KIND
def test_quantizing_the_dense_matrix_again_changes_nothing(levels: str) -> None:
    quantized = _quantized(_matrix(4, 172), levels=levels)
    again = quantize_matrix(quantized.dense(), quantized.scales, 64, levels)
    assert torch.equal(again.weight, quantized.weight)
    assert torch.equal(again.scales, quantized.scales)


def test_codes_are_counted_without_the_padding_of_rows() -> None:
    quantized = _quantized(_matrix(3, 13), 8)
    planes = unpack_planes(quantized.weight, 13, torch.uint8)
    codes = Counter(zip(planes[0].flatten().tolist(), planes[1].flatten().tolist(), strict=True))
    counts = count_planes(quantized)
    assert counts.weights == 39
    assert counts.ones_b1 == codes[1, 0] + codes[1, 1]
    assert counts.ones_b2 == codes[0, 1] + codes[1, 1]
    assert counts.ones_both == codes[1, 1]
    shares = [count / 39 for count in codes.values()]
    assert counts.level_entropy == pytest.approx(-sum(p * math.log2(p) for p in shares))
    assert counts.additions_per_weight == pytest.approx((counts.ones_b1 + counts.ones_b2) / 39)


def test_counts_of_layers_add_up() -> None:
    total = PlaneCounts(8, 4, 2, 1) + PlaneCounts(16, 1, 2, 0)
    assert total == PlaneCounts(24, 5, 4, 1)


def test_a_group_of_64_stores_two_and_a_half_bits_per_weight() -> None:
    assert stored_bits(_quantized(_matrix(4, 128))) / (4 * 128) == 2.5
    assert stored_bits(_quantized(_matrix(1, 172))) == 2 * 22 * 8 + 2 * 3 * 16
    assert stored_bits(_quantized(_matrix(1, 172), levels="tied")) == 2 * 22 * 8 + 3 * 16
    assert stored_bits(_quantized(_matrix(1, 172), levels="offset")) == 2 * 22 * 8 + 3 * 16 + 8

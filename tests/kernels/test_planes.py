"""Dense weights from planes, and the gradient of their scales, against arithmetic in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbllm_cli.kernels import can_scale_planes, dequantize, plane_gradients, plane_levels
from tests.kernels.layers import normal, random_layer

pytestmark = pytest.mark.usefixtures("instruction_set")


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 150),
    size=st.sampled_from([8, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    offset=st.booleans(),
)
def test_levels_and_gradients_are_those_of_the_formula(
    rows: int, columns: int, size: int, dtype: torch.dtype, offset: bool
) -> None:
    layer = random_layer(columns, rows, size, offset=offset)
    layer.scales[:, 0, 0] = 0
    planes, alpha = torch.from_numpy(layer.planes), torch.from_numpy(layer.scales).float()
    assert can_scale_planes(alpha, size, dtype)
    dense = plane_levels(planes, alpha, columns, size, dtype)
    assert dense.dtype == dtype
    near = 2**-8 if dtype.itemsize == 2 else 1e-6
    np.testing.assert_allclose(dense.double(), layer.dense(), rtol=near, atol=1e-6)
    assert torch.equal(dense, dequantize(planes, alpha, columns, size, dtype))
    grad = normal(rows, columns, seed=3, dtype=dtype)
    bits = np.unpackbits(layer.planes, axis=-1, bitorder="little")[..., :columns]
    # The offset is the scale of a plane of ones, but of none in a group without levels.
    ones = np.ones_like(bits[: len(alpha) - 2])
    ones[:, 0, :size] = 0
    terms = np.concatenate((bits, ones)) * grad.double().numpy()
    starts = np.arange(0, columns, size)
    expected = np.add.reduceat(terms, starts, axis=-1)
    found = plane_gradients(grad, planes, alpha, size)
    np.testing.assert_allclose(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_one_thread_and_two_give_the_same_bytes() -> None:
    layer = random_layer(1000, 300, 64, offset=True)
    planes, alpha = torch.from_numpy(layer.planes), torch.from_numpy(layer.scales).float()
    grad = normal(300, 1000)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            dense = plane_levels(planes, alpha, 1000, 64, torch.bfloat16)
            found.append((dense, plane_gradients(grad, planes, alpha, 64)))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_other_dtypes_and_group_sizes_are_left_to_torch() -> None:
    alpha = torch.zeros(2, 3, 1)
    assert can_scale_planes(alpha, 8, torch.float32)
    assert not can_scale_planes(alpha, 12, torch.float32)
    assert not can_scale_planes(alpha, 8, torch.float16)
    assert not can_scale_planes(alpha.bfloat16(), 8, torch.bfloat16)

"""The compiled kernels, in every instruction set that the processor has."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.layers import DTYPES, assert_close, normal, random_layer

# -- what is computed ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    in_features=st.integers(1, 700),
    out_features=st.integers(1, 150),
    group_size=st.sampled_from([32, 64, 96, 128, 256]),
    batch=st.sampled_from([(), (0,), (1,), (4,), (32,), (33,), (70,), (2, 3), (5, 13), (3, 0)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    offset=st.booleans(),
)
def test_the_product_is_that_of_the_dense_matrix_whatever_the_shape(
    instruction_set: str,
    in_features: int,
    out_features: int,
    group_size: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    offset: bool,
) -> None:
    layer = random_layer(in_features, out_features, group_size, seed, offset=offset)
    x = normal(*batch, in_features, dtype=dtype, seed=seed)
    assert_close(layer(x), x, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [512, 1024, 2080])
def test_groups_may_be_longer_than_a_stretch(
    instruction_set: str, dtype: torch.dtype, group_size: int
) -> None:
    layer = random_layer(2500, 70, group_size, offset=True)
    for rows in (1, 3):
        x = normal(rows, 2500, dtype=dtype)
        assert_close(layer(x), x, layer)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 40])
def test_float32_is_added_without_rounding_the_activations(
    instruction_set: str, group_size: int, rows: int
) -> None:
    layer, x = random_layer(1100, 150, group_size), normal(rows, 1100)
    expected = layer.expected(x)
    error = np.linalg.norm(layer(x).double().numpy() - expected)
    assert error <= 2e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 40])
def test_rounded_activations_leave_the_result_within_a_thousandth(
    instruction_set: str, group_size: int, rows: int
) -> None:
    layer = random_layer(1100, 150, group_size)
    # bfloat16's inputs and float16's outputs, whose own rounding is a fifth of what is allowed.
    x = normal(rows, 1100, dtype=torch.bfloat16).half()
    expected = layer.expected(x)
    error = np.linalg.norm(layer(x).double().numpy() - expected)
    assert error <= 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_very_different_size_keep_their_own_precision(
    instruction_set: str, dtype: torch.dtype
) -> None:
    group_size, groups = 64, 6
    layer = random_layer(group_size * groups, 48, group_size)
    # Activations grow by 8 from group to group, scales shrink by 8: each group weighs as much.
    growth = 8.0 ** np.arange(groups)
    layer.scales[:] = (layer.scales * 8 / growth).astype(np.float16)
    factors = torch.tensor(growth / 512).repeat_interleave(group_size)
    for rows in (1, 5):
        x = (normal(rows, group_size * groups) * factors).to(dtype)
        assert_close(layer(x), x, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [6e-8, 1e-6, 3e-5])
def test_denormal_scales_are_no_zeros(
    instruction_set: str, dtype: torch.dtype, scale: float
) -> None:
    layer = random_layer(172, 20, 64)
    layer.scales[:] = np.where(layer.scales < 0, -scale, scale)
    x = normal(3, 172, dtype=dtype) * 1000
    assert np.abs(layer.expected(x)).max() > 1e-4
    assert_close(layer(x), x, layer)


# -- layouts of x --------------------------------------------------------------------------------


def _views(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "transposed": normal(172, 40, dtype=dtype).t(),
        "every other input": normal(3, 344, dtype=dtype)[:, ::2],
        "one vector of a matrix": normal(172, 3, dtype=dtype)[:, 1],
        "one row many times": normal(1, 172, dtype=dtype).expand(36, 172),
        "one number many times": normal(4, 1, dtype=dtype).expand(4, 172),
        "a part of wider rows": normal(5, 300, dtype=dtype)[1:, 77:249],
        "heads put last": normal(2, 4, 7, 43, dtype=dtype).transpose(1, 2).flatten(2),
        "dimensions in another order": normal(172, 3, 5, dtype=dtype).permute(2, 1, 0),
        "four dimensions": normal(2, 3, 172, 5, dtype=dtype).transpose(2, 3),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(_views(torch.float32)))
def test_a_view_gives_what_its_copy_gives(
    instruction_set: str, name: str, dtype: torch.dtype
) -> None:
    layer, x = random_layer(172, 37, 64), _views(dtype)[name]
    y = layer(x)
    assert torch.equal(y, layer(x.clone(memory_format=torch.contiguous_format)))
    assert y.is_contiguous()
    assert_close(y, x, layer)


@pytest.mark.usefixtures("kernels")
def test_any_number_of_vectors_gives_the_product_of_each() -> None:
    layer = random_layer(32, 16, 32)
    x = normal(4200, 32, dtype=torch.bfloat16)
    expected = layer(x)
    for rows in [*range(1, 200), *range(900, 1200), *range(2030, 2130), 4199]:
        assert torch.allclose(layer(x[:rows]), expected[:rows], rtol=1e-2, atol=1e-3), rows

"""The kernels' layout, and the operator that reads it by torch's rules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbllm_cli.kernels import fdb_linear_tiled
from dbllm_cli.kernels.cpu import CpuKernels
from tests.kernels.layers import DTYPES, assert_close, normal, random_layer

# -- tiles ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    in_features=st.integers(1, 700),
    out_features=st.integers(1, 150),
    group_size=st.sampled_from([32, 64, 96, 128, 256, 512, 1024]),
    seed=st.integers(0, 2**31),
    scales=st.sampled_from([2, 3]),
)
def test_planes_and_scales_come_back_from_tiles_bit_by_bit(
    kernels: CpuKernels,
    in_features: int,
    out_features: int,
    group_size: int,
    seed: int,
    scales: int,
) -> None:
    draw = np.random.default_rng(seed)
    groups = -(-in_features // group_size)
    weight = torch.from_numpy(
        draw.integers(0, 256, (2, out_features, -(-in_features // 8)), dtype=np.uint8)
    )
    codes = draw.integers(0, 2**16, (scales, out_features, groups), dtype=np.uint16)
    alpha = torch.from_numpy(codes.view(np.float16))
    tiles = kernels.to_tiles(weight, alpha, in_features, group_size)
    planes, found = kernels.from_tiles(tiles, in_features, out_features, group_size)
    assert torch.equal(planes, weight)
    assert torch.equal(found.view(torch.int16), alpha.view(torch.int16))


def test_tiles_are_made_of_views_too(kernels: CpuKernels) -> None:
    layer = random_layer(172, 37, 64, offset=True)
    stored = torch.from_numpy(layer.planes), torch.from_numpy(layer.scales)
    weight, alpha = (t.repeat_interleave(2, dim=1)[:, ::2].mT.contiguous().mT for t in stored)
    assert torch.equal(kernels.to_tiles(weight, alpha, 172, 64), layer.tiles)


@pytest.mark.parametrize("out_features", [16, 48, 64, 80, 272])
@pytest.mark.parametrize(("in_features", "group_size"), [(32, 32), (96, 96), (640, 128), (768, 64)])
def test_tiles_take_the_bytes_of_planes_and_scales(
    kernels: CpuKernels, in_features: int, out_features: int, group_size: int
) -> None:
    layer = random_layer(in_features, out_features, group_size)
    assert layer.tiles.nbytes == layer.planes.nbytes + layer.scales.nbytes


def test_odd_shapes_are_filled_up_to_16_rows_and_words_of_32_inputs(kernels: CpuKernels) -> None:
    # Two groups, of 64 and of 33 inputs that take 2 words: 4 words and 2 scales a plane and row.
    assert random_layer(97, 17, 64).tiles.nbytes == 32 * 2 * (4 * 4 + 2 * 2)


def test_group_sizes_that_fit_are_multiples_of_32(kernels: CpuKernels) -> None:
    fitting = [size for size in (8, 16, 32, 48, 64, 96, 100, 128, 256) if kernels.fits(size)]
    assert fitting == [32, 64, 96, 128, 256]


# -- torch's rules -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (40,), (2, 3)])
def test_the_operator_keeps_torch_s_rules(
    kernels: CpuKernels, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer, x = random_layer(172, 5, 64), normal(*batch, 172, dtype=dtype)
    operator = torch.ops.dbllm.fdb_linear_tiled.default
    torch.library.opcheck(operator, (x, layer.tiles, 5, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_meta_device_only_shape_and_dtype_are_made(
    kernels: CpuKernels, dtype: torch.dtype
) -> None:
    tiles = random_layer(172, 5, 64).tiles.to("meta")
    y = fdb_linear_tiled(torch.empty(2, 3, 172, dtype=dtype, device="meta"), tiles, 172, 5, 64)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 5), dtype, "meta")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_gives_the_same(kernels: CpuKernels, dynamic: bool) -> None:
    torch.compiler.reset()
    layer = random_layer(172, 5, 64)
    tiles = layer.tiles

    def product(x: Tensor) -> Tensor:
        return fdb_linear_tiled(torch.relu(x), tiles, 172, 5, 64).square()

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 7):
        x = normal(rows, 172)
        assert torch.equal(compiled(x), product(x))


@pytest.mark.parametrize("batch", [(4,), (2, 3), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_input_is_that_of_the_dense_product(
    instruction_set: str, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = random_layer(172, 37, 64, offset=True)
    x = normal(*batch, 172, dtype=dtype).requires_grad_()
    upstream = normal(*batch, 37, dtype=dtype, seed=3)
    y = layer(x)
    assert_close(y.detach(), x, layer)
    y.backward(upstream)
    expected = upstream.double().numpy() @ layer.dense()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    error = np.linalg.norm(x.grad.double().numpy() - expected) / np.linalg.norm(expected)
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("shape", "dtype", "told"),
    [
        ((3, 171), torch.float32, "172 inputs .* not 171"),
        ((173,), torch.bfloat16, "172 inputs .* not 173"),
        ((3, 172), torch.float64, "not 172 in torch.float64"),
        ((3, 172), torch.int32, "not 172 in torch.int32"),
    ],
)
def test_other_inputs_are_refused(
    kernels: CpuKernels, shape: tuple[int, ...], dtype: torch.dtype, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        random_layer(172, 5, 64)(torch.ones(shape, dtype=dtype))

"""The compiled kernels, in every instruction set that the processor has."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbllm_cli.kernels import cpu_kernels, fdb_linear_tiled
from dbllm_cli.kernels.cpu import CpuKernels

Array = npt.NDArray[np.float64]

REPOSITORY = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Largest relative error of rounding a number to the dtype, and half its smallest denormal.
ROUNDING = {
    torch.float32: (2**-24, 2.0**-150),
    torch.bfloat16: (2**-8, 2.0**-134),
    torch.float16: (2**-11, 2.0**-25),
}
# Of the sums, before they are rounded to the output's dtype.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Layer:
    """Random planes and scales, and their product by arithmetic of its own."""

    planes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    in_features: int
    group_size: int

    @property
    def out_features(self) -> int:
        return self.planes.shape[1]

    @property
    def tiles(self) -> Tensor:
        kernels = cpu_kernels()
        assert kernels is not None
        weight, alpha = torch.from_numpy(self.planes), torch.from_numpy(self.scales)
        return kernels.to_tiles(weight, alpha, self.in_features, self.group_size)

    def __call__(self, x: Tensor) -> Tensor:
        return fdb_linear_tiled(x, self.tiles, self.in_features, self.out_features, self.group_size)

    def dense(self) -> Array:
        """`alpha1·b1 + alpha2·b2`, `[out, in]`."""
        bits = np.unpackbits(self.planes, axis=-1, bitorder="little")[..., : self.in_features]
        return (bits * self._scales()).sum(0)

    def expected(self, x: Tensor) -> Array:
        return x.detach().double().numpy() @ self.dense().T

    def sizes(self, x: Tensor) -> Array:
        """How large the outputs are, had no term another's opposite sign."""
        squares = (self._scales() ** 2).sum(0)
        return np.sqrt(x.detach().double().numpy() ** 2 @ squares.T)

    def _scales(self) -> Array:
        wide = np.repeat(self.scales.astype(np.float64), self.group_size, axis=-1)
        return wide[..., : self.in_features]


def random_layer(
    in_features: int, out_features: int, group_size: int, seed: int = 0, scale: float = 0.1
) -> Layer:
    """Bits beyond the last input are random too: files may hold any there."""
    draw = np.random.default_rng(seed)
    shape = (2, out_features, -(-in_features // group_size))
    planes = draw.integers(0, 256, (2, out_features, -(-in_features // 8)), dtype=np.uint8)
    spread = 2.0 ** draw.integers(-5, 3, shape)
    scales = (draw.normal(size=shape) * spread * scale).astype(np.float16)
    return Layer(planes, scales, in_features, group_size)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(y: Tensor, x: Tensor, layer: Layer) -> None:
    """No further off in norm than the kernel's own error and one rounding of the output."""
    expected = layer.expected(x)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    relative, denormal = ROUNDING[x.dtype]
    if x.dtype == torch.float32:
        relative = 0
        denormal *= 4 * layer.scales.shape[-1]
    allowed = (
        ERROR[x.dtype] * np.linalg.norm(layer.sizes(x))
        + relative * np.linalg.norm(expected)
        + denormal * np.sqrt(expected.size)
    )
    assert np.linalg.norm(y.double().numpy() - expected) <= allowed


# -- what is computed ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    in_features=st.integers(1, 700),
    out_features=st.integers(1, 150),
    group_size=st.sampled_from([32, 64, 96, 128, 256]),
    batch=st.sampled_from([(), (0,), (1,), (4,), (32,), (33,), (70,), (2, 3), (5, 13), (3, 0)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_the_product_is_that_of_the_dense_matrix_whatever_the_shape(
    instruction_set: str,
    in_features: int,
    out_features: int,
    group_size: int,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
) -> None:
    layer = random_layer(in_features, out_features, group_size, seed)
    x = normal(*batch, in_features, dtype=dtype, seed=seed)
    assert_close(layer(x), x, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [512, 1024, 2080])
def test_groups_may_be_longer_than_a_stretch(
    instruction_set: str, dtype: torch.dtype, group_size: int
) -> None:
    layer = random_layer(2500, 70, group_size)
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


# -- unusual numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_zeros_give_zeros(instruction_set: str, dtype: torch.dtype, zero: float, rows: int) -> None:
    layer = random_layer(172, 37, 64)
    y = layer(torch.full((rows, 172), zero, dtype=dtype))
    assert torch.equal(y, torch.zeros(rows, 37, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_beside_others_gives_zeros(instruction_set: str, dtype: torch.dtype) -> None:
    layer, x = random_layer(172, 37, 64), normal(3, 172, dtype=dtype)
    x[1] = 0
    y = layer(x)
    assert not y[1].any()
    assert_close(y, x, layer)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float32, 1e-40),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-18),
        (torch.bfloat16, 1e-19),
        (torch.bfloat16, 1e-20),
        (torch.bfloat16, 1e-30),
        (torch.bfloat16, 1e-37),
        (torch.bfloat16, 1e-39),
        (torch.bfloat16, 1e-40),
        (torch.float16, 100.0),
        (torch.float16, 1e-5),
        (torch.float16, 1e-7),
    ],
)
def test_very_large_and_very_small_inputs_lose_no_precision(
    instruction_set: str, dtype: torch.dtype, size: float, rows: int
) -> None:
    layer = random_layer(300, 37, 64, scale=1.0)
    x = (normal(rows, 300).double() * size).to(dtype)
    assert x.count_nonzero() > 90 * rows
    y = layer(x)
    assert y.isfinite().all()
    assert_close(y, x, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_has_its_own_precision(instruction_set: str, dtype: torch.dtype) -> None:
    layer = random_layer(300, 100, 64, scale=1.0)
    sizes = torch.tensor([1, 1e-39, 1e30, 1e-30, 1e-19, 1e-20, 1e-10, 0])
    x = (normal(len(sizes), 300).double() * sizes.unsqueeze(-1)).to(dtype)
    for row, y in zip(x, layer(x), strict=True):
        assert_close(y, row, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_number_of_a_dtype_times_one_is_itself(
    instruction_set: str, dtype: torch.dtype, sign: int
) -> None:
    planes = np.zeros((2, 17, 16), dtype=np.uint8)
    planes[0, :, 3] = 1
    scales = np.ones((2, 17, 2), dtype=np.float16)
    largest = sign * torch.finfo(dtype).max
    x = torch.zeros(2, 128, dtype=dtype)
    x[1, 24] = largest
    y = Layer(planes, scales, 128, 64)(x)
    assert torch.equal(y[0], torch.zeros(17, dtype=dtype))
    assert torch.allclose(y[1], torch.full((17,), largest, dtype=dtype), rtol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_result_beyond_the_dtype_is_infinite(instruction_set: str, dtype: torch.dtype) -> None:
    planes = np.full((2, 2, 8), 255, dtype=np.uint8)
    scales = np.array([1, -1], dtype=np.float16).reshape(1, 2, 1).repeat(2, axis=0)
    x = torch.full((64,), torch.finfo(dtype).max / 32, dtype=dtype)
    assert Layer(planes, scales, 64, 64)(x).tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 70, 171])
def test_one_input_that_is_not_finite_makes_its_row_nan_and_no_other(
    instruction_set: str, dtype: torch.dtype, bad: float, place: int
) -> None:
    layer, x = random_layer(172, 70, 64), normal(35, 172, dtype=dtype)
    before = layer(x)
    rows = [2, 34]
    x[rows, place] = bad
    after = layer(x)
    assert after[rows].isnan().all()
    others = [row for row in range(35) if row not in rows]
    assert torch.equal(after[others], before[others])
    assert layer(x[2]).isnan().all()


def test_every_bfloat16_goes_through_unharmed(instruction_set: str) -> None:
    planes = np.zeros((2, 1, 4), dtype=np.uint8)
    planes[1] = 1
    scales = np.ones((2, 1, 1), dtype=np.float16)
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    smallest = torch.finfo(torch.bfloat16).smallest_normal
    for x in (codes, codes.half()):
        normal_ones = x[x.isfinite() & (x.float().abs() >= smallest)]
        y = Layer(planes, scales, 32, 32)(_alone(normal_ones))
        assert torch.equal(y.squeeze(-1), normal_ones)


def _alone(values: Tensor) -> Tensor:
    """Rows of 32 inputs, all but the first zero."""
    return torch.nn.functional.pad(values.unsqueeze(-1), (0, 31))


# -- threads and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_one_and_two_threads_give_the_same_bytes(
    instruction_set: str, dtype: torch.dtype, rows: int
) -> None:
    layer, x = random_layer(4096, 1030, 32), normal(rows, 4096, dtype=dtype)
    expected = layer(x)
    torch.set_num_threads(2)
    try:
        results = [layer(x) for _ in range(3)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(result, expected) for result in results)


def test_calls_from_many_threads_do_not_disturb_each_other(instruction_set: str) -> None:
    layer = random_layer(1024, 256, 64)
    tiles = layer.tiles
    inputs = [normal(8, 1024, seed=seed) for seed in range(4)]

    def products(x: Tensor) -> list[Tensor]:
        return [fdb_linear_tiled(x, tiles, 1024, 256, 64) for _ in range(40)]

    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for results, one in zip(pool.map(products, inputs), expected, strict=True):
            assert all(torch.equal(result, one) for result in results)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_calls_leave_no_memory_behind(instruction_set: str) -> None:
    layers = [random_layer(1024, 512, 128, seed=seed) for seed in range(20)]

    def run_all() -> None:
        for layer in layers:
            layer(normal(32, 1024))

    run_all()
    before = _resident_mib()
    for _ in range(20):
        run_all()
    # Inputs, outputs and tiles of these calls are 180 MiB in all.
    assert _resident_mib() - before < 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thread_that_ends_gives_its_work_memory_back(instruction_set: str) -> None:
    layer, x = random_layer(2048, 16, 128), normal(32, 2048)

    def run_in_a_thread() -> None:
        thread = Thread(target=layer, args=(x,))
        thread.start()
        thread.join()

    run_in_a_thread()
    before = _resident_mib()
    for _ in range(60):
        run_in_a_thread()
    # The tables of one call are a mebibyte, or 8 of the portable kernel.
    assert _resident_mib() - before < 30


# -- tiles ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    in_features=st.integers(1, 700),
    out_features=st.integers(1, 150),
    group_size=st.sampled_from([32, 64, 96, 128, 256, 512, 1024]),
    seed=st.integers(0, 2**31),
)
def test_planes_and_scales_come_back_from_tiles_bit_by_bit(
    kernels: CpuKernels, in_features: int, out_features: int, group_size: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    groups = -(-in_features // group_size)
    weight = torch.from_numpy(
        draw.integers(0, 256, (2, out_features, -(-in_features // 8)), dtype=np.uint8)
    )
    codes = draw.integers(0, 2**16, (2, out_features, groups), dtype=np.uint16)
    alpha = torch.from_numpy(codes.view(np.float16))
    tiles = kernels.to_tiles(weight, alpha, in_features, group_size)
    planes, scales = kernels.from_tiles(tiles, in_features, out_features, group_size)
    assert torch.equal(planes, weight)
    assert torch.equal(scales.view(torch.int16), alpha.view(torch.int16))


def test_tiles_are_made_of_views_too(kernels: CpuKernels) -> None:
    layer = random_layer(172, 37, 64)
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
    layer, x = random_layer(172, 37, 64), normal(*batch, 172, dtype=dtype).requires_grad_()
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


# -- DBLLM_KERNEL --------------------------------------------------------------------------------

_TELL = """
from dbllm_cli.errors import ConfigError
from dbllm_cli.kernels import cpu_kernels
try:
    kernels = cpu_kernels()
    print("none" if kernels is None else kernels.instruction_set)
except ConfigError as error:
    print("ConfigError:", error.message, error.hint)
"""


def _told_with(value: str) -> str:
    """What a process of its own says, for which DBLLM_KERNEL has this value."""
    environment = os.environ | {"DBLLM_KERNEL": value}
    return subprocess.run(
        [sys.executable, "-c", _TELL],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_reference_can_be_forced() -> None:
    assert _told_with("reference") == "none"


def test_an_instruction_set_can_be_forced(kernels: CpuKernels) -> None:
    assert _told_with("portable") == "portable"


def test_an_instruction_set_that_is_not_there_is_refused_with_the_choices() -> None:
    told = _told_with("nonsense")
    assert told.startswith("ConfigError: DBLLM_KERNEL=nonsense can't be used")
    for choice in ("avx512", "avx2", "portable", "reference"):
        assert choice in told

"""The compiled kernels on unusual numbers, in every instruction set."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dbllm_cli.kernels import cpu
from dbllm_cli.kernels.cpu import CpuKernels
from tests.kernels.layers import DTYPES, HALVES, Layer, assert_close, normal, random_layer

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


def test_kernels_of_other_sources_are_warned_of_and_not_used(
    kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_LAYOUT", 99)
    monkeypatch.delenv("DBLLM_KERNEL", raising=False)
    with pytest.warns(UserWarning, match="compiled from other sources"):
        assert cpu.cpu_kernels.__wrapped__() is None
    assert "compiled from other sources" in str(cpu.refusal())

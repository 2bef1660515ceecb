import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbllm_cli.kernels import cpu_kernels, dequantize_rows, int8_linear, quantize_rows


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _expected(x: Tensor, weight: Tensor) -> np.ndarray:
    """The product in float64, from the bytes of the rows."""
    stored = weight.numpy()
    integers = stored[:, :-2].view(np.int8).astype(np.float64)
    scales = np.ascontiguousarray(stored[:, -2:]).view(np.float16).astype(np.float64)
    return np.asarray(x.double().numpy() @ (integers * scales).T)


def test_every_value_comes_back_within_half_a_step_of_its_row() -> None:
    matrix = _normal(20, 33) * torch.logspace(-3, 3, 20).unsqueeze(-1)
    step = matrix.abs().amax(-1, keepdim=True) / 127
    error = (dequantize_rows(quantize_rows(matrix), torch.float32) - matrix).abs()
    # Rounding the scale to float16 moves the largest values by up to 127 · 2^-11 steps.
    assert (error <= 0.57 * step).all()


def test_a_row_of_zeros_stays_zero() -> None:
    assert not dequantize_rows(quantize_rows(torch.zeros(2, 5)), torch.float32).any()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 1300),
    st.integers(1, 40),
    st.sampled_from([(), (1,), (5,), (2, 20)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_product_is_that_of_the_stored_rows(
    inputs: int, rows: int, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = quantize_rows(_normal(rows, inputs, seed=inputs))
    x = _normal(*batch, inputs, seed=rows).to(dtype)
    y, expected = int8_linear(x, weight), _expected(x, weight)
    assert (y.dtype, y.shape) == (dtype, (*batch, rows))
    rounding = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    error = np.linalg.norm(y.double().numpy() - expected)
    size = np.linalg.norm(x.double()) * np.linalg.norm(dequantize_rows(weight, torch.float64))
    assert error <= rounding * np.linalg.norm(expected) + 1e-4 * size


def test_an_input_that_is_not_finite_gives_nan_in_its_own_row_alone() -> None:
    if cpu_kernels() is None:
        pytest.skip("the CPU kernels are not compiled")
    x = _normal(3, 40)
    x[1, 7] = torch.inf
    y = int8_linear(x, quantize_rows(_normal(9, 40, seed=1)))
    assert y.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("size", [1e-40, 1e30])
def test_very_small_and_very_large_inputs_keep_their_digits(size: float) -> None:
    weight = quantize_rows(_normal(9, 40, seed=1))
    x = _normal(2, 40) * size
    y, expected = int8_linear(x, weight).double().numpy(), _expected(x, weight)
    # A denormal number has few digits of its own.
    assert np.abs(y - expected).max() <= max(1e-4 * np.abs(expected).max(), 1e-44)


def test_one_thread_and_two_give_the_same_bytes() -> None:
    weight, x = quantize_rows(_normal(5000, 576)), _normal(3, 576, seed=1)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(int8_linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_gradients_to_the_input_are_those_of_the_dense_product() -> None:
    weight = quantize_rows(_normal(9, 40, seed=1))
    x = _normal(2, 40).requires_grad_()
    int8_linear(x, weight).sum().backward()
    assert x.grad is not None
    expected = dequantize_rows(weight, torch.float32).sum(0).expand(2, -1)
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_gives_the_same() -> None:
    torch.compiler.reset()
    weight, x = quantize_rows(_normal(9, 40, seed=1)), _normal(2, 40)
    product = torch.compile(lambda x: int8_linear(x, weight), backend="aot_eager", fullgraph=True)
    assert torch.equal(product(x), int8_linear(x, weight))


@pytest.mark.parametrize("weight", [torch.zeros(3, 41), torch.zeros(3, 42, dtype=torch.uint8)])
def test_rows_that_do_not_fit_are_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="41 inputs take uint8 rows of 43 bytes"):
        int8_linear(_normal(2, 41), weight)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbllm_cli.kernels import cpu_kernels, rms_norm
from tests.kernels.layers import DTYPES, ROUNDING, normal


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(), (1,), (3,), (2, 20), (0,)]),
    hidden=st.sampled_from([1, 5, 16, 33, 576, 4096]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_rows_have_the_mean_square_one_before_the_weight(
    shape: tuple[int, ...], hidden: int, dtype: torch.dtype, size: float
) -> None:
    x = (normal(*shape, hidden) * size).to(dtype)
    weight = normal(hidden, seed=1, dtype=dtype)
    out = rms_norm(x, weight, 1e-5)
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight.double().numpy()
    assert (out.dtype, out.shape) == (dtype, x.shape)
    relative, denormal = ROUNDING[dtype]
    # Rounded twice: before the weight and after it.
    error = np.abs(out.double().numpy() - expected)
    assert (error <= (2.1 * relative + 1e-6) * np.abs(expected) + 2 * hidden * denormal).all()


def test_inputs_may_lie_apart() -> None:
    x, weight = normal(16, 3, 40).transpose(0, 1)[..., ::2], normal(20, seed=1)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.contiguous(), weight, 1e-5))


def test_gradients_flow_where_they_are_asked_for() -> None:
    x, weight = normal(3, 16).requires_grad_(), normal(16, seed=1)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_one_thread_and_two_give_the_same_bytes() -> None:
    if cpu_kernels() is None:
        pytest.skip("the CPU kernels are not compiled")
    x, weight = normal(300, 576), normal(576, seed=1)
    expected = rms_norm(x, weight, 1e-5)
    torch.set_num_threads(2)
    try:
        assert torch.equal(rms_norm(x, weight, 1e-5), expected)
    finally:
        torch.set_num_threads(1)

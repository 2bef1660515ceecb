import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbllm_cli.kernels import dequantize, unpack_planes


def test_bits_are_read_least_significant_first_and_padding_is_cut() -> None:
    packed = torch.tensor([[0b10000001, 0b00000110]], dtype=torch.uint8)
    bits = unpack_planes(packed, 11, torch.float32)
    assert bits.tolist() == [[1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1]]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 300),
    st.sampled_from([8, 64, 128]),
    st.sampled_from([2, 3]),
    st.integers(0, 2**31),
)
def test_every_weight_is_the_sum_of_its_scaled_bits_and_the_offset(
    inputs: int, group_size: int, scales: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    groups = -(-inputs // group_size)
    weight = draw.integers(0, 256, (2, 3, -(-inputs // 8)), dtype=np.uint8)
    alpha = draw.normal(size=(scales, 3, groups)).astype(np.float16)
    bits = np.unpackbits(weight, axis=-1, bitorder="little")[..., :inputs]
    wide = np.repeat(alpha.astype(np.float64), group_size, axis=-1)[..., :inputs]
    result = dequantize(
        torch.tensor(weight), torch.tensor(alpha), inputs, group_size, torch.float32
    )
    expected = (bits * wide[:2]).sum(0) + wide[2:].sum(0)
    assert np.allclose(result.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_of_two_scales_is_rounded_once(dtype: torch.dtype) -> None:
    weight = torch.full((2, 1, 1), 255, dtype=torch.uint8)
    alpha = torch.tensor([[[1.001]], [[-0.998]]], dtype=torch.float16)
    exact = (alpha[0].double() + alpha[1].double()).to(dtype)
    assert torch.equal(dequantize(weight, alpha, 8, 8, dtype), exact.expand(1, 8))

import numpy as np
import pytest
import torch
from torch import Tensor

from dbllm_cli.fdb.scales import (
    decode_scales,
    encode_scales,
    join_tied,
    split_tied,
    tie_scales,
)


def _scales(*shape: int, octaves: float = 6.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp2(-octaves * torch.rand(2, *shape, generator=generator)) * 0.05
    return (sizes * torch.tensor((1.0, -1.0)).view(2, 1, 1)).half()


def _value(code: int) -> float:
    """A float of 3 bits of exponent and 5 of mantissa, the largest being 1."""
    exponent, mantissa = divmod(code, 32)
    significand = 1 + mantissa / 32 if exponent else mantissa / 32
    return float(significand * 2.0 ** max(exponent, 1) / ((1 + 31 / 32) * 2.0**7))


def test_codes_are_unsigned_floats_times_the_scale_of_their_row() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 1, 128)
    decoded = decode_scales(codes, torch.tensor([0.5], dtype=torch.float16)).double().numpy()
    expected = np.array([_value(code) * 0.5 for code in range(256)]).reshape(2, 1, 128)
    expected[1] *= -1
    assert np.allclose(decoded, expected, rtol=2**-11, atol=2**-25)


def test_a_scale_is_off_by_at_most_a_64th_over_six_octaves_of_a_row() -> None:
    alpha = _scales(16, 40)
    decoded = decode_scales(*encode_scales(alpha)).double()
    off = ((decoded - alpha.double()) / alpha.double()).abs()
    assert off.max() < 1 / 64 + 2**-10
    assert off.square().mean().sqrt() < 0.008


def test_the_largest_scale_of_a_row_and_empty_planes_are_kept_exactly() -> None:
    alpha = _scales(4, 9)
    alpha[0, 1] = 0
    alpha[:, 2] = 0
    decoded = decode_scales(*encode_scales(alpha))
    largest = alpha.abs().amax((0, 2))
    assert torch.equal(decoded.abs().amax((0, 2)), largest)
    assert torch.equal(decoded == 0, alpha == 0)


@pytest.mark.parametrize("octaves", [2.0, 6.0])
def test_decoded_scales_have_the_codes_that_they_came_from(octaves: float) -> None:
    codes, row_scale = encode_scales(_scales(16, 40, octaves=octaves))
    again, same = encode_scales(decode_scales(codes, row_scale), row_scale)
    assert torch.equal(again, codes)
    assert torch.equal(same, row_scale)


def test_tied_scales_are_the_nearest_of_which_one_is_twice_the_other() -> None:
    alpha = _scales(8, 8).double()
    tied = torch.stack(tie_scales(*alpha))
    small, large = tied.abs().amin(0), tied.abs().amax(0)
    assert torch.allclose(large, 2 * small, rtol=1e-12)
    steps = torch.linspace(0, 0.06, 6001, dtype=torch.float64).view(-1, 1, 1, 1)
    shapes = torch.tensor([[2.0, -1.0], [1.0, -2.0]], dtype=torch.float64).view(2, 2, 1, 1)
    tried = (steps * shapes.unsqueeze(1).unsqueeze(1) - alpha).square().sum(-3).amin((0, 1, 2))
    assert torch.allclose((tied - alpha).square().sum(0), tried, atol=1e-8)


def test_a_tied_pair_is_stored_as_one_step_with_levels_of_minus_1_0_1_and_2_steps() -> None:
    step = torch.tensor([[[0.25, -0.5, 0.0]]], dtype=torch.float16)
    alpha1, alpha2 = split_tied(step)
    for number, expected in enumerate((0.25, -0.5, 0.0)):
        first, second = float(alpha1[0, number]), float(alpha2[0, number])
        levels = {first * b1 + second * b2 for b1 in (0, 1) for b2 in (0, 1)}
        assert levels == {k * expected for k in (-1, 0, 1, 2)}
    assert torch.equal(join_tied(split_tied(step)), step)

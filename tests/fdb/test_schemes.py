import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbllm_cli.configs import InitFdbConfig
from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.fdb.quantized import quantize_matrix
from dbllm_cli.fdb.schemes import open_scheme
from dbllm_cli.fdb.schemes._spans import Spans
from dbllm_cli.fdb.schemes.tied import join_tied, split_tied, tie_scales
from dbllm_cli.llm.quantizer import DbllmConfig
from dbllm_cli.registry import declared, registered
from dbllm_cli.training.layers import ScaleLinear

OFFSET = open_scheme("offset")
SCHEMES = list(registered("fdb/schemes"))


def _scales(*shape: int, octaves: float = 6.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp2(-octaves * torch.rand(2, *shape, generator=generator)) * 0.05
    return (sizes * torch.tensor((1.0, -1.0)).view(2, 1, 1)).half()


# -- every scheme ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("inputs", [128, 172])
def test_what_a_scheme_fits_is_stored_and_read_as_it_is(name: str, inputs: int) -> None:
    scheme = open_scheme(name)
    matrix = torch.randn(6, inputs, generator=torch.Generator().manual_seed(0)) * 0.02
    scales = scheme.round(fit_scales(matrix, 64, "als", levels=name))
    stored = scheme.store(scales)
    assert scales.shape == (scheme.numbers, 6, math.ceil(inputs / 64))
    assert torch.equal(scheme.expand(stored), scales)
    assert torch.equal(scheme.round(scales.float()), scales)
    assert scheme.stored_bits(scales) == 8 * sum(t.nbytes for t in stored.values())
    assert next(iter(stored)) == "alpha"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_knows_its_stored_tensors_from_others(name: str) -> None:
    scheme = open_scheme(name)
    places = scheme.empty_stored((172, 6), 64, "cpu")
    assert scheme.is_stored(places, 6, 3)
    assert not scheme.is_stored(places, 6, 4)
    assert not scheme.is_stored({}, 6, 3)
    others = [open_scheme(other) for other in SCHEMES if other != name]
    assert not any(other.is_stored(places, 6, 3) for other in others)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_fit_is_better_than_the_papers_start(name: str) -> None:
    matrix = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    paper = quantize_matrix(matrix, fit_scales(matrix, 64, "paper"), 64).dense()
    found = quantize_matrix(matrix, fit_scales(matrix, 64, "als", levels=name), 64, name).dense()
    assert (found - matrix).norm() < (paper - matrix).norm()


@pytest.mark.parametrize("name", SCHEMES)
def test_settings_and_models_take_every_scheme_that_is_a_file(name: str) -> None:
    assert InitFdbConfig(levels=name).levels == name
    assert DbllmConfig(levels=name, format_version=3).levels == name
    layer = FdbLinear(172, 6, 64, levels=name)
    matrix = torch.randn(6, 172, generator=torch.Generator().manual_seed(0))
    quantized = quantize_matrix(matrix, fit_scales(matrix, 64, "als", levels=name), 64, name)
    state = {"weight": quantized.weight} | quantized.scheme.store(quantized.scales)
    layer.load_state_dict(state)
    assert torch.allclose(layer(torch.eye(172)).T, quantized.dense(), atol=1e-3)
    trained = ScaleLinear(quantized, None)
    trained(torch.eye(172)).square().sum().backward()
    assert trained.scales.grad is not None
    assert torch.equal(trained.quantize().scales, quantized.scales)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_says_which_ways_of_init_fdb_find_its_scales(name: str) -> None:
    assert "als" in declared("fdb/schemes", "METHODS")[name]


# -- offset ----------------------------------------------------------------------------------------


def _offset_scales(*shape: int, octaves: float = 3.0) -> Tensor:
    """Like those of weights: outer over some octaves, inner and centre within it."""
    generator = torch.Generator().manual_seed(0)
    share, inner, centre = torch.rand(3, *shape, generator=generator)
    outer = torch.exp2(-octaves * share) * 0.05
    return Spans((centre * 1.4 - 0.7) * outer, outer, inner * outer).scales


_NUMBER = st.floats(-4, 4, width=32)


@settings(deadline=None, max_examples=200)
@given(st.tuples(_NUMBER, _NUMBER, _NUMBER))
def test_projected_offset_scales_are_upright_with_their_centre_in_reach(
    numbers: tuple[float, float, float],
) -> None:
    alpha = OFFSET.project(torch.tensor(numbers).view(3, 1, 1))
    alpha1, alpha2, beta = (float(number) for number in alpha)
    outer, inner = (alpha1 - alpha2) / 2, (alpha1 + alpha2) / 2
    assert alpha2 <= 1e-6
    assert alpha1 >= -1e-6
    assert inner >= -1e-6
    assert abs(beta + inner) <= 0.703125 * outer + 1e-6
    assert torch.allclose(OFFSET.project(alpha), alpha, atol=1e-5)


def test_offset_scales_take_16_bits_a_group_and_8_a_row() -> None:
    alpha = OFFSET.round(_offset_scales(10, 9))
    codes, exponents = OFFSET.store(alpha).values()
    assert (codes.dtype, codes.shape) == (torch.uint16, (1, 10, 9))
    assert (exponents.dtype, exponents.shape) == (torch.int8, (10,))
    assert OFFSET.stored_bits(alpha) == 10 * 9 * 16 + 10 * 8


@pytest.mark.parametrize("octaves", [0.5, 3.0, 9.0])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 1e3])
def test_rounded_offset_scales_are_stored_as_they_are(octaves: float, size: float) -> None:
    rounded = OFFSET.round(_offset_scales(40, 9, octaves=octaves) * size)
    assert torch.equal(OFFSET.expand(OFFSET.store(rounded)), rounded)
    assert torch.equal(OFFSET.round(rounded.float()), rounded)


def test_a_code_is_off_by_half_a_step_of_each_number_at_most() -> None:
    alpha = _offset_scales(64, 9, octaves=5.0)
    exact, found = (Spans.of(a.double()) for a in (alpha, OFFSET.round(alpha)))
    # 4 significant bits where outer is no less than a 60th of the row's largest.
    assert ((found.outer - exact.outer) / exact.outer).abs().max() < 1 / 16
    assert ((found.inner - exact.inner) / exact.outer).abs().max() < 1 / 64 + 1 / 16
    assert ((found.centre - exact.centre) / exact.outer).abs().max() < 3 / 128 + 0.71 / 16


def test_an_outlier_leaves_the_other_groups_of_its_row_their_levels() -> None:
    matrix = torch.randn(2, 576, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[0, 3] = 6.0
    alpha = fit_scales(matrix, 64, "als", levels="offset")
    error = (quantize_matrix(matrix, alpha, 64, "offset").dense() - matrix)[:, 64:]
    shares = error.square().sum(-1) / matrix[:, 64:].square().sum(-1)
    assert shares[0] < 1.3 * shares[1]


@pytest.mark.parametrize("times", [1e1, 1e3, 3e3, 1e4, 1e6])
def test_a_group_that_is_tiny_beside_its_row_gets_no_more_than_its_own_energy_as_error(
    times: float,
) -> None:
    matrix = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[:, 64:] *= times
    quantized = quantize_matrix(
        matrix, fit_scales(matrix, 64, "als", levels="offset"), 64, "offset"
    )
    small = quantized.dense()[:, :64] - matrix[:, :64]
    assert small.norm() <= 1.001 * matrix[:, :64].norm()
    # Only ranges that the codes can't hold are told of.
    coarse = OFFSET.coarse_groups(quantized.scales)
    assert coarse[:, 0].all() == coarse[:, 0].any() == (times > 100)
    assert not coarse[:, 1].any()


def test_a_row_with_an_outlier_of_2500_standard_deviations_is_told_of() -> None:
    matrix = torch.randn(2, 576, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[0, 3] = 50.0
    errors = {}
    for name in ("offset", "plain"):
        quantized = quantize_matrix(matrix, fit_scales(matrix, 64, "als", levels=name), 64, name)
        rest = (quantized.dense() - matrix)[:, 64:].square().sum(-1)
        errors[name] = rest / matrix[:, 64:].square().sum(-1)
        coarse = quantized.scheme.coarse_groups(quantized.scales)
        assert coarse[0, 1:].all() == (name == "offset")
        assert not coarse[1].any()
    assert errors["offset"][0] > 2 * errors["plain"][0]
    assert errors["offset"][1] < errors["plain"][1]


def test_the_bits_of_a_code_are_the_documented_ones() -> None:
    # outer 24 = (8 + 4) 2 units: code 20; inner 7.5 of 32: code 7; centre -3 of 3/64: code 13.
    outer = 24.0
    spans = Spans(*(torch.tensor([[x, 0.0]]) for x in (-9 / 64 * outer, outer, 7.5 / 32 * outer)))
    spans.outer[0, 1] = 960.0
    codes, exponents = OFFSET.store(spans.scales).values()
    assert exponents.tolist() == [0]
    assert codes.to(torch.int32)[0, 0, 0] == 20 | 7 << 6 | 13 << 11


def test_a_group_without_levels_has_one_code_and_stays_empty() -> None:
    alpha = _offset_scales(3, 4)
    alpha[:, :, 1] = 0
    alpha[:, 2] = 0
    codes, _ = OFFSET.store(OFFSET.project(alpha)).values()
    assert (codes.to(torch.int32)[0, :, 1] == 0).all()
    rounded = OFFSET.round(alpha)
    assert (rounded[:, :, 1] == 0).all()
    assert (rounded[:, 2] == 0).all()


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6, 65600.0])
def test_a_scale_beyond_float16_is_an_error(kind: str, value: float) -> None:
    alpha = torch.tensor((value, -value / 2, 0.0)[: open_scheme(kind).numbers]).view(-1, 1, 1)
    with pytest.raises(StageFailedError, match="not finite"):
        open_scheme(kind).round(alpha)


def test_rounding_plain_scales_projects_the_signs() -> None:
    rounded = open_scheme("plain").round(torch.tensor([[[-0.5, 1.0]], [[-2.0, 0.25]]]))
    assert rounded.tolist() == [[[0.0, 1.0]], [[-2.0, 0.0]]]


# -- tied ------------------------------------------------------------------------------------------


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

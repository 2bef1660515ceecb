import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbllm_cli.fdb.levels import (
    assign_planes,
    clamp_to_cells,
    nearest_level,
    project_signs,
    sorted_levels,
    straight_through_mask,
)
from tests.fdb.reference import CODES, brute_force_value, paper_planes

# Eighths are exact in float32, so that ties are real ties.
_EIGHTHS = st.integers(-64, 64).map(lambda n: n / 8)
_SCALES = st.tuples(st.integers(0, 32), st.integers(-32, 0)).map(lambda p: (p[0] / 8, p[1] / 8))


def _column(value: float) -> Tensor:
    return torch.tensor([value])


def _alpha(*scales: float) -> Tensor:
    return torch.tensor(scales).unsqueeze(-1)


def _planes(weights: list[float], *scales: float) -> Tensor:
    return assign_planes(torch.tensor(weights), _alpha(*scales))


@settings(deadline=None)
@given(st.lists(_EIGHTHS, min_size=1, max_size=8), _SCALES)
def test_planes_give_the_nearest_of_the_four_levels_in_either_orientation(
    weights: list[float], scales: tuple[float, float]
) -> None:
    alpha1, alpha2 = scales
    b1, b2 = _planes(weights, alpha1, alpha2)
    value = alpha1 * b1.double() + alpha2 * b2.double()
    distances = (value - torch.tensor(weights, dtype=torch.float64)).abs().tolist()
    assert distances == [brute_force_value(weight, alpha1, alpha2) for weight in weights]


@settings(deadline=None)
@given(st.lists(_EIGHTHS, min_size=1, max_size=8), _SCALES)
def test_the_nearest_level_is_the_value_of_the_planes(
    weights: list[float], scales: tuple[float, float]
) -> None:
    b1, b2 = _planes(weights, *scales)
    nearest = nearest_level(torch.tensor(weights), sorted_levels(_alpha(*scales)))
    assert torch.equal(nearest, scales[0] * b1 + scales[1] * b2)


@settings(deadline=None)
@given(st.lists(_EIGHTHS, min_size=1, max_size=8), _SCALES, _EIGHTHS)
def test_an_offset_moves_all_levels(
    weights: list[float], scales: tuple[float, float], beta: float
) -> None:
    moved = [weight + beta for weight in weights]
    assert torch.equal(_planes(moved, *scales, beta), _planes(weights, *scales))
    nearest = nearest_level(torch.tensor(weights), sorted_levels(_alpha(*scales)))
    after = nearest_level(torch.tensor(moved), sorted_levels(_alpha(*scales, beta)))
    assert torch.equal(after, nearest + beta)


@settings(deadline=None, max_examples=300)
@given(_EIGHTHS, _SCALES)
def test_where_the_paper_s_rule_holds_the_planes_are_its_planes_ties_included(
    weight: float, scales: tuple[float, float]
) -> None:
    alpha1, alpha2 = scales
    assume(alpha1 + alpha2 > 0)
    b1, b2 = _planes([weight], alpha1, alpha2)
    assert (int(b1), int(b2)) == paper_planes(weight, alpha1, alpha2)


def test_the_middle_tie_goes_up_and_the_outer_ties_go_down() -> None:
    for alpha1, alpha2 in ((2.0, -1.0), (1.0, -2.0)):
        levels = sorted(alpha1 * b1 + alpha2 * b2 for b1, b2 in CODES)
        borders = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
        nearest = nearest_level(torch.tensor(borders), sorted_levels(_alpha(alpha1, alpha2)))
        assert nearest.tolist() == [levels[0], levels[2], levels[2]]
        b1, b2 = _planes(borders, alpha1, alpha2)
        assert (alpha1 * b1 + alpha2 * b2).tolist() == [levels[0], levels[2], levels[2]]


def test_a_group_of_zero_scales_has_empty_planes() -> None:
    b1, b2 = _planes([-1.0, 0.0, 1.0], 0.0, 0.0)
    assert not b1.any()
    assert not b2.any()


def test_projection_keeps_right_signs_and_zeroes_wrong_ones() -> None:
    alpha1, alpha2 = project_signs(torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5]))
    assert alpha1.tolist() == [2.0, 0.0]
    assert alpha2.tolist() == [-3.0, 0.0]


@pytest.mark.parametrize(
    ("alpha1", "alpha2", "below", "above"),
    [(2.0, -1.0, -1.5, 2.5), (1.0, -2.0, -2.5, 1.5), (4.0, -1.0, -1.5, 4.5)],
)
def test_the_gradient_passes_up_to_half_a_step_outside_the_outer_levels(
    alpha1: float, alpha2: float, below: float, above: float
) -> None:
    weights = torch.tensor([below - 0.01, below, 0.0, above, above + 0.01])
    mask = straight_through_mask(weights, sorted_levels(_alpha(alpha1, alpha2)))
    assert mask.tolist() == [False, True, True, True, False]


_DISTINCT = st.tuples(st.floats(0.01, 4), st.floats(-4, -0.01)).filter(
    lambda scales: abs(scales[0] + scales[1]) > 1e-2
)


@settings(deadline=None, max_examples=300)
@given(st.floats(-10, 10, width=32), st.sampled_from(CODES), _DISTINCT)
def test_a_clamped_weight_keeps_its_planes_and_moves_no_further_than_it_must(
    weight: float, code: tuple[int, int], scales: tuple[float, float]
) -> None:
    alpha, planes = _alpha(*scales), torch.tensor(code).bool().unsqueeze(-1)
    clamped = clamp_to_cells(_column(weight), planes, alpha)
    after = assign_planes(clamped, alpha)
    assert (int(after[0]), int(after[1])) == code
    before = assign_planes(_column(weight), alpha)
    if (int(before[0]), int(before[1])) == code:
        assert float(clamped) == pytest.approx(weight, abs=2e-2)
    else:
        halfway = [(a + b) / 2 for a in _levels(scales) for b in _levels(scales) if a != b]
        assert min(abs(float(clamped) - border) for border in halfway) < 2e-2


def _levels(scales: tuple[float, float]) -> list[float]:
    return [scales[0] * b1 + scales[1] * b2 for b1, b2 in CODES]


@pytest.mark.parametrize("code", CODES)
def test_a_clamped_weight_keeps_its_planes_where_two_levels_coincide(code: tuple[int, int]) -> None:
    weights = torch.tensor([-2.0, -0.7, -0.1, 0.1, 0.7, 2.0])
    planes = torch.tensor(code).bool().unsqueeze(-1).expand(2, 6)
    clamped = clamp_to_cells(weights, planes, _alpha(1.0, -1.0))
    assert torch.equal(assign_planes(clamped, _alpha(1.0, -1.0)), planes)


def test_a_weight_clamped_into_a_narrow_outer_cell_still_gets_gradients() -> None:
    # Levels -0.05, 0, 0.95 and 1.
    alpha = _alpha(1.0, -0.05)
    planes = torch.tensor([[1, 0], [0, 1]]).bool()
    clamped = clamp_to_cells(torch.tensor([0.5, 0.5]), planes, alpha, margin=0.2)
    assert clamped.tolist() == pytest.approx([0.975 + 0.2 * 0.05, -0.025 - 0.2 * 0.05])
    assert straight_through_mask(clamped, sorted_levels(alpha)).all()

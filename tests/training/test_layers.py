from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.quantized import QuantizedMatrix, quantize_matrix
from dbllm_cli.kernels import unpack_planes
from dbllm_cli.training import layers as training_layers
from dbllm_cli.training.layers import LatentLinear, ScaleLinear, TrainableLinear

OUT, IN, GROUP = 3, 20, 8


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantized(matrix: Tensor, group_size: int = GROUP, levels: str = "plain") -> QuantizedMatrix:
    alpha = fit_scales(matrix, group_size, "als", levels=levels)
    return quantize_matrix(matrix, alpha, group_size, levels)


def _latent(levels: str = "plain", fixed_cells: bool = False) -> LatentLinear:
    matrix = _normal(OUT, IN) * 1.5
    quantized = _quantized(_normal(OUT, IN), levels=levels)
    return LatentLinear(quantized, matrix, _normal(OUT, seed=4), fixed_cells)


def _in_fixed_cells(levels: str = "plain") -> LatentLinear:
    return _latent(levels, fixed_cells=True)


def _scaled(levels: str = "plain") -> ScaleLinear:
    return ScaleLinear(_quantized(_normal(OUT, IN), levels=levels), None)


@pytest.fixture(params=["kernels", "torch"])
def kernels_or_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test with the compiled kernels and without."""
    if request.param == "torch":
        monkeypatch.setattr(training_layers, "can_round_latents", lambda *_: False)
        monkeypatch.setattr(training_layers, "can_scale_planes", lambda *_: False)


def _weight_gradient(layer: TrainableLinear, x: Tensor, output_gradient: Tensor) -> Tensor:
    layer(x).backward(output_gradient)
    return output_gradient.double().t() @ x.double()


@pytest.mark.usefixtures("kernels_or_torch")
@pytest.mark.parametrize("levels", ["plain", "offset"])
@pytest.mark.parametrize("make", [_latent, _scaled])
def test_gradients_of_the_scales_are_the_sums_over_the_group_of_gradient_times_plane(
    make: Callable[[str], TrainableLinear], levels: str
) -> None:
    layer = make(levels)
    planes = unpack_planes(layer.quantize().weight, IN, torch.float64)
    # The offset is the scale of a plane of ones.
    planes = torch.cat((planes, torch.ones_like(planes)))[: len(layer.scales)]
    expected = torch.zeros(len(planes), OUT, 3, dtype=torch.float64)
    gradient = _weight_gradient(layer, _normal(5, IN, seed=1), _normal(5, OUT, seed=2))
    for plane in range(len(planes)):
        for row in range(OUT):
            for column in range(IN):
                expected[plane, row, column // GROUP] += (
                    gradient[row, column] * planes[plane, row, column]
                )
    assert layer.scales.grad.shape == expected.shape
    assert torch.allclose(layer.scales.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_latent_weight_passes_inside_the_bounds_and_stops_outside() -> None:
    layer = _latent()
    gradient = _weight_gradient(layer, _normal(5, IN, seed=1), _normal(5, OUT, seed=2))
    alpha1, alpha2 = layer.scales.detach().double().repeat_interleave(GROUP, -1)[..., :IN]
    levels = torch.stack((alpha2, alpha1 * 0, alpha1 + alpha2, alpha1)).sort(0).values
    below = levels[0] - (levels[1] - levels[0]) / 2
    above = levels[3] + (levels[3] - levels[2]) / 2
    latent = layer.latent.detach().double()
    inside = (latent >= below) & (latent <= above)
    assert 0 < inside.sum() < inside.numel()
    assert layer.latent.grad is not None
    assert torch.allclose(layer.latent.grad.double(), gradient * inside, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels_or_torch")
@pytest.mark.parametrize("levels", ["plain", "offset"])
@pytest.mark.parametrize("make", [_latent, _in_fixed_cells, _scaled])
def test_a_layer_that_trains_gives_the_output_of_what_it_will_store(
    make: Callable[[str], TrainableLinear], levels: str
) -> None:
    layer = make(levels)
    x = _normal(2, 5, IN, seed=3)
    dense = layer.quantize().dense()
    assert torch.equal(layer.dense(torch.float32), dense)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, dense, layer.bias))


@pytest.mark.parametrize("make", [_latent, _scaled])
def test_under_autocast_products_are_in_bfloat16_and_gradients_in_float32(make: object) -> None:
    assert callable(make)
    layer = make()
    x = _normal(5, IN).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert x.grad is not None


@pytest.mark.parametrize("levels", ["plain", "offset"])
def test_latent_weights_train_through_the_rounding_of_codes(levels: str) -> None:
    layer = _latent(levels)
    with torch.no_grad():
        # A fifth of a step: codes stay what they are, float16 moves.
        layer.scales[0] *= 1.003
    dense, stored = layer.dense(torch.float32), layer.quantize().dense()
    near = 1e-3 if levels == "plain" else 1e-6
    assert torch.allclose(dense, stored, rtol=near, atol=near)


@pytest.mark.parametrize("make", [_in_fixed_cells, _scaled])
def test_scales_can_train_as_they_are_and_are_rounded_at_the_end(
    make: Callable[[str], TrainableLinear],
) -> None:
    layer = make("offset")
    layer.rounds_scales = False
    before = layer.dense(torch.float32).detach()
    with torch.no_grad():
        layer.scales[0] *= 1.003
    assert not torch.equal(layer.dense(torch.float32), before)
    layer.rounds_scales = True
    assert torch.equal(layer.dense(torch.float32), before)
    assert torch.equal(layer.quantize().dense(), before)


def test_scales_that_are_no_numbers_give_no_numbers() -> None:
    layer = _latent("offset")
    with torch.no_grad():
        layer.scales[1] = torch.nan
    assert layer(_normal(2, IN)).isnan().any()


def test_planes_of_latent_weights_follow_them_and_fixed_planes_do_not() -> None:
    layer = _latent()
    with torch.no_grad():
        layer.latent.neg_()
    expected = quantize_matrix(layer.latent.detach(), layer.scales.detach(), GROUP)
    assert torch.equal(layer.quantize().weight, expected.weight)
    fixed = _scaled()
    before = fixed.packed.clone()
    with torch.no_grad():
        fixed.scales.mul_(3)
    assert torch.equal(fixed.quantize().weight, before)


@pytest.mark.usefixtures("kernels_or_torch")
@pytest.mark.parametrize("levels", ["plain", "offset"])
def test_scales_that_move_leave_latent_weights_in_fixed_cells(levels: str) -> None:
    layer = _in_fixed_cells(levels)
    layer.rounds_scales = False
    planes = layer.quantize().weight
    with torch.no_grad():
        layer.scales.mul_(1.5)
    moved = layer.quantize()
    assert torch.equal(moved.weight, planes)
    # Of the stored scales: float16, or codes of an outer of three bits after the point.
    assert torch.allclose(layer.dense(torch.float32), moved.dense(), rtol=0.1, atol=0.05)


def test_fixed_planes_are_no_float_copy_and_only_the_scales_train() -> None:
    layer = _scaled()
    assert [name for name, _ in layer.named_parameters()] == ["scales"]
    assert layer.packed.dtype == torch.uint8


def test_the_bias_is_frozen() -> None:
    assert [name for name, _ in _latent().named_parameters()] == ["scales", "latent"]


def test_projection_brings_the_scales_back_to_their_signs() -> None:
    layer = _scaled()
    with torch.no_grad():
        layer.scales.neg_()
    layer.project()
    assert not layer.scales.any()


def test_a_group_whose_scales_are_zero_stays_zero_in_training() -> None:
    matrix = _normal(OUT, 16)
    matrix[0, :8] = 0
    layer = LatentLinear(_quantized(matrix), matrix, None)
    layer(_normal(4, 16, seed=1)).square().sum().backward()
    assert layer.scales.grad is not None
    assert not layer.scales.grad[:, 0, 0].any()


@pytest.mark.usefixtures("kernels_or_torch")
@pytest.mark.parametrize("levels", ["plain", "offset"])
def test_a_group_that_lost_its_scales_has_no_planes_and_trains_no_more(levels: str) -> None:
    layer = _in_fixed_cells(levels)
    with torch.no_grad():
        layer.scales[:, 1, 2] = 0
    layer(_normal(4, IN, seed=1)).square().sum().backward()
    assert layer.scales.grad is not None
    assert not layer.scales.grad[:, 1, 2].any()
    assert layer.scales.grad[:, 1, 1].any()
    planes = unpack_planes(layer.quantize().weight, IN, torch.uint8)
    assert not planes[:, 1, 2 * GROUP :].any()


@pytest.mark.usefixtures("kernels_or_torch")
@pytest.mark.parametrize("levels", ["plain", "offset"])
def test_gradients_are_those_of_the_cells_where_scales_have_moved(levels: str) -> None:
    layer = _in_fixed_cells(levels)
    layer.rounds_scales = False
    planes = unpack_planes(layer.quantize().weight, IN, torch.float64)
    latent = layer.latent.detach().clone()
    before = _weight_gradient(layer, _normal(5, IN, seed=1), _normal(5, OUT, seed=2))
    assert layer.latent.grad is not None
    passes = layer.latent.grad != 0
    with torch.no_grad():
        layer.scales.mul_(1.5)
    layer.zero_grad()
    layer(_normal(5, IN, seed=1)).backward(_normal(5, OUT, seed=2))
    assert torch.equal(layer.latent.detach(), latent)
    assert torch.equal(layer.latent.grad != 0, passes)
    expected = before.new_zeros(2, OUT, 3)
    for column in range(IN):
        expected[..., column // GROUP] += before[:, column] * planes[..., column]
    assert layer.scales.grad is not None
    assert torch.allclose(layer.scales.grad[:2].double(), expected, rtol=1e-4, atol=1e-5)


def test_scales_never_turn_the_order_of_the_levels_of_fixed_cells() -> None:
    layer = _in_fixed_cells()
    alpha1, alpha2 = layer.scales.detach().clone()
    upright = alpha1 + alpha2 >= 0
    with torch.no_grad():
        # Every group's sum gets the other sign.
        layer.scales[0], layer.scales[1] = -alpha2, -alpha1
    layer.project()
    assert upright.any()
    assert not upright.all()
    middle = (alpha1 - alpha2) / 2
    assert torch.allclose(layer.scales, torch.stack((middle, -middle)))
    moving = _latent()
    with torch.no_grad():
        moving.scales[0], moving.scales[1] = -alpha2, -alpha1
    moving.project()
    assert torch.equal(moving.scales[0], -alpha2)


def test_tied_levels_of_fixed_cells_stay_tied() -> None:
    layer = _in_fixed_cells("tied")
    assert layer.cells is not None
    upright = layer.cells[0] + layer.cells[1] >= 0
    assert upright.any()
    assert not upright.all()
    for seed in range(20):
        with torch.no_grad():
            layer.scales += 0.3 * _normal(*layer.scales.shape, seed=seed)
        layer.project()
        larger = torch.where(upright, layer.scales[0], -layer.scales[1])
        smaller = torch.where(upright, -layer.scales[1], layer.scales[0])
        torch.testing.assert_close(larger, 2 * smaller)
        assert (smaller >= 0).all()
    stored = layer.quantize().dense(torch.float32)
    torch.testing.assert_close(layer.dense(torch.float32), stored, rtol=2e-3, atol=1e-6)

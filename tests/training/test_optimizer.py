import itertools
import math

import pytest
import torch
from torch import Tensor

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.quantized import latent_start, quantize_matrix
from dbllm_cli.training.layers import LatentLinear, ScaleLinear, TrainableLinear
from dbllm_cli.training.optimizer import RelativeAdamW, schedule_factor

LATENT_LR, SCALE_LR = 1.5e-2, 2e-3


def _layers(sizes: tuple[float, ...] = (1.0, 100.0)) -> dict[str, TrainableLinear]:
    layers: dict[str, TrainableLinear] = {}
    for number, size in enumerate(sizes):
        matrix = size * torch.randn(4, 32, generator=torch.Generator().manual_seed(number))
        quantized = quantize_matrix(matrix, fit_scales(matrix, 8, "als"), 8)
        layers[f"layer{number}"] = LatentLinear(quantized, matrix, None)
    return layers


def _backward(layers: dict[str, TrainableLinear], seed: int) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    sum((layer(x).square().mean() for layer in layers.values()), torch.zeros(())).backward()


def _values(layers: dict[str, TrainableLinear]) -> list[Tensor]:
    return [p.detach().clone() for layer in layers.values() for p in layer.parameters()]


def test_the_schedule_warms_up_to_the_whole_rate_and_ends_at_five_percent() -> None:
    factors = [schedule_factor(step, 103, 3) for step in range(104)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[53] == pytest.approx((1 + 0.05) / 2)
    assert factors[103] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[3:]))


def test_the_schedule_needs_no_warm_up_and_stands_a_warm_up_as_long_as_the_run() -> None:
    assert schedule_factor(0, 10, 0) == 1.0
    assert all(0 < schedule_factor(step, 2, 5) <= 1 for step in range(8))
    assert all(math.isfinite(schedule_factor(step, 1, 1)) for step in range(3))


def test_the_first_step_moves_each_layer_by_its_rate_relative_to_mean_alpha1() -> None:
    layers = _layers()
    before, sizes = (
        _values(layers),
        [float(lay.scales[0].detach().abs().mean()) for lay in layers.values()],
    )
    optimizer = RelativeAdamW(layers, LATENT_LR, SCALE_LR)
    _backward(layers, 0)
    optimizer.step(0.5)
    moves = [float((b - a).abs().max()) for a, b in zip(before, _values(layers), strict=True)]
    # AdamW's first step is the rate itself, whatever the gradient's size.
    expected = [0.5 * rate * size for size in sizes for rate in (SCALE_LR, LATENT_LR)]
    assert moves == pytest.approx(expected, rel=1e-2)
    assert sizes[1] / sizes[0] > 50


@pytest.mark.parametrize("transposed", [False, True])
def test_every_latent_weight_moves_against_its_own_gradient(transposed: bool) -> None:
    # 20 inputs leave a short last group; Conv1D's matrix is a transposed view.
    shape = (20, 16) if transposed else (16, 20)
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    matrix = matrix.t() if transposed else matrix
    quantized = quantize_matrix(matrix, fit_scales(matrix, 8, "als"), 8)
    layer = LatentLinear(quantized, latent_start(quantized, matrix), None)
    optimizer = RelativeAdamW({"layer": layer}, LATENT_LR, SCALE_LR)
    x = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    layer(x).square().mean().backward()
    before, gradient = layer.latent.detach().clone(), layer.latent.grad
    assert gradient is not None
    signs = gradient.sign()
    optimizer.step(1.0)
    assert torch.equal((layer.latent.detach() - before).sign(), -signs)


def test_tied_scales_move_together_against_the_gradient_of_their_step() -> None:
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    quantized = quantize_matrix(matrix, fit_scales(matrix, 8, "als", levels="tied"), 8, "tied")
    layer = ScaleLinear(quantized, None)
    optimizer = RelativeAdamW({"layer": layer}, LATENT_LR, SCALE_LR)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    target = torch.randn(30, 64, generator=torch.Generator().manual_seed(2))
    before = layer.scales.detach().clone()
    (layer(x) - target).square().mean().backward()

    def loss(factor: Tensor) -> Tensor:
        planes = ScaleLinear(quantized, None)
        planes.scales.requires_grad_(False).copy_(before)
        dense = planes.dense(torch.float32).detach().unflatten(1, (8, 8)) * factor.unsqueeze(-1)
        return (x @ dense.flatten(1).t() - target).square().mean()

    factor = torch.ones(64, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(factor), factor)
    optimizer.step(1.0)
    sizes = layer.scales.detach().abs()
    assert torch.allclose(sizes.amax(0), 2 * sizes.amin(0), rtol=1e-5)
    grown = (sizes.amax(0) - before.abs().amax(0)).sign()
    assert torch.equal(grown, -slope.sign())


def test_a_step_brings_scales_back_to_their_signs_and_clears_gradients() -> None:
    layers = _layers((1.0,))
    optimizer = RelativeAdamW(layers, LATENT_LR, 100.0)
    _backward(layers, 0)
    optimizer.step(1.0)
    alpha = layers["layer0"].scales.detach()
    assert (alpha[0] >= 0).all()
    assert (alpha[1] <= 0).all()
    assert all(parameter.grad is None for parameter in optimizer.parameters())


def test_latent_weights_decay_towards_where_they_started_and_scales_do_not() -> None:
    layers = _layers((1.0,))
    size = float(layers["layer0"].scales[0].detach().abs().mean())
    starts = [value.double() for value in _values(layers)]
    expected = [start.clone() for start in starts]
    moments = [(torch.zeros_like(start), torch.zeros_like(start)) for start in starts]
    optimizer = RelativeAdamW(layers, LATENT_LR, SCALE_LR, latent_decay=0.1)
    for step, factor in enumerate((1.0, 0.8, 0.6, 0.4), 1):
        _backward(layers, step)
        for number, (rate, decay) in enumerate(((SCALE_LR, 0.0), (LATENT_LR, 0.1))):
            gradient = optimizer.parameters()[number].grad
            assert gradient is not None
            first, second = moments[number]
            first.mul_(0.9).add_(0.1 * gradient.double())
            second.mul_(0.95).add_(0.05 * gradient.double() ** 2)
            adam = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-12)
            expected[number] += factor * decay * (starts[number] - expected[number])
            expected[number] -= factor * rate * size * adam
        optimizer.step(factor)
    for ours, theirs in zip(_values(layers), expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_scales_alone_train_without_latent_weights() -> None:
    latent = _layers((1.0,))["layer0"]
    optimizer = RelativeAdamW({"only": ScaleLinear(latent.quantize(), None)}, 1.0, 1.0)
    assert len(optimizer.parameters()) == 1


def test_tiny_gradients_move_as_far_as_large_ones() -> None:
    moves = []
    for scale in (1.0, 1e-9):
        layers = _layers((1.0,))
        optimizer = RelativeAdamW(layers, LATENT_LR, SCALE_LR)
        before = _values(layers)
        _backward(layers, 0)
        for parameter in optimizer.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(scale)
        optimizer.step(1.0)
        moves.append(
            torch.cat([(b - a).flatten() for a, b in zip(before, _values(layers), strict=True)])
        )
    assert (moves[0].abs().mean() - moves[1].abs().mean()).abs() < 0.1 * moves[0].abs().mean()


def test_the_step_after_loading_a_saved_state_is_the_step_that_would_have_come() -> None:
    layers = _layers()
    optimizer = RelativeAdamW(layers, LATENT_LR, SCALE_LR)
    for step in range(3):
        _backward(layers, step)
        optimizer.step(1.0)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    fresh = _layers()
    resumed = RelativeAdamW(fresh, LATENT_LR, SCALE_LR)
    resumed.load_state_tensors(saved)
    for these, theirs in ((layers, optimizer), (fresh, resumed)):
        for step in (3, 4):
            _backward(these, step)
            theirs.step(0.7)
    for ours, expected in zip(_values(fresh), _values(layers), strict=True):
        assert torch.equal(ours, expected)


def test_a_state_saved_before_the_first_step_can_be_loaded() -> None:
    first, second = _layers(), _layers()
    saved = RelativeAdamW(first, LATENT_LR, SCALE_LR).state_tensors()
    RelativeAdamW(second, LATENT_LR, SCALE_LR).load_state_tensors(saved)
    assert all(torch.equal(a, b) for a, b in zip(_values(first), _values(second), strict=True))


def test_a_bias_that_starts_at_zero_trains_at_the_rate_of_the_other_vectors() -> None:
    others = {
        "norm": torch.full((4,), 2.0, requires_grad=True),
        "bias": torch.zeros(4, requires_grad=True),
        "table": torch.full((3, 4), 0.1, requires_grad=True),
    }
    optimizer = RelativeAdamW({}, 0.0, 0.0, others, 1e-2)
    for parameter in others.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    moved = {"norm": 2.0, "bias": 0.0, "table": 0.1}
    steps = {name: float(moved[name] - others[name].detach().max()) for name in others}
    assert steps == pytest.approx({"norm": 2e-2, "bias": 2e-2, "table": 1e-3}, rel=1e-2)

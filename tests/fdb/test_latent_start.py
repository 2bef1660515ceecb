"""Where latent weights start from."""

import torch
from torch import Tensor

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.quantized import QuantizedMatrix, latent_start, quantize_matrix
from dbllm_cli.training.layers import LatentLinear


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _quantized(matrix: Tensor, levels: str = "plain") -> QuantizedMatrix:
    return quantize_matrix(matrix, fit_scales(matrix, 64, "als", levels=levels), 64, levels)


def test_training_from_the_same_teacher_starts_at_its_weights() -> None:
    matrix = _normal(8, 172)
    start = latent_start(_quantized(matrix), matrix)
    assert torch.allclose(start, matrix, atol=1e-2)
    assert (start == matrix).float().mean() > 0.99


def test_training_starts_at_the_teacher_s_weights_where_a_scale_is_zero() -> None:
    # With alpha2 = 0 the levels are 0, 0, alpha1 and alpha1.
    matrix = torch.tensor([[0.1, 0.1, 0.2, 0.1, 1.0, 1.1, 1.2, 0.9]])
    alpha = torch.tensor([[[1.0]], [[0.0]]])
    quantized = quantize_matrix(matrix, alpha, 8)
    start = latent_start(quantized, matrix)
    assert torch.allclose(start, matrix, atol=1e-2)


def test_training_from_another_matrix_starts_with_the_stored_planes() -> None:
    quantized = _quantized(_normal(8, 172))
    start = latent_start(quantized, _normal(8, 172, seed=9))
    again = quantize_matrix(start, quantized.scales, 64)
    assert torch.equal(again.weight, quantized.weight)


def test_training_can_start_away_from_the_borders_between_the_cells() -> None:
    quantized = _quantized(_normal(8, 172), "offset")
    start = latent_start(quantized, _normal(8, 172, seed=9), margin=0.2)
    assert torch.equal(
        quantize_matrix(start, quantized.scales, 64, "offset").weight, quantized.weight
    )
    alpha1, alpha2, beta = quantized.scales.double().repeat_interleave(64, -1)[..., :172]
    levels = torch.stack((alpha2, alpha1 * 0, alpha1 + alpha2, alpha1)).sort(0).values + beta
    borders = (levels[1:] + levels[:-1]) / 2
    # An outer cell is as wide as the step between its level and the next.
    below, above = borders[0] - (levels[1] - levels[0]), borders[2] + (levels[3] - levels[2])
    edges = torch.stack((below, *borders, above))
    cell = (start.double() > borders).sum(0, keepdim=True)
    lower, upper = edges.gather(0, cell)[0], edges.gather(0, cell + 1)[0]
    from_lower = ((start - lower) / (upper - lower)).masked_fill(cell[0] == 0, 1)
    from_upper = ((upper - start) / (upper - lower)).masked_fill(cell[0] == 3, 1)
    assert (torch.minimum(from_lower, from_upper) >= 0.199).all()
    for number in range(4):
        nearest = torch.minimum(from_lower, from_upper)[cell[0] == number].min()
        assert nearest < 0.201, "none is moved farther than it must"


def test_latent_weights_kept_for_stored_scales_give_the_stored_planes() -> None:
    quantized = _quantized(_normal(8, 172), "offset")
    layer = LatentLinear(quantized, _normal(8, 172, seed=9), None, fixed_cells=True)
    with torch.no_grad():
        layer.scales.mul_(1.3)
        layer.scales[2] += 0.1
        layer.latent.add_(0.05)
    layer.project()
    stored = layer.quantize()
    kept = latent_start(stored, layer.latent.detach())
    again = quantize_matrix(kept, stored.scales, 64, "offset")
    assert torch.equal(again.weight, stored.weight)
    assert torch.equal(again.scales, stored.scales)

import copy

import pytest
import torch

from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.fdb.quantized import quantize_matrix


def _layer(bias: bool = True, in_features: int = 172) -> FdbLinear:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, in_features, generator=generator)
    quantized = quantize_matrix(matrix, fit_scales(matrix, 64, "als"), 64)
    layer = FdbLinear(in_features, 5, 64, bias)
    layer.weight.copy_(quantized.weight)
    layer.alpha.copy_(quantized.alpha)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias, generator=generator)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_that_of_the_dense_matrix(bias: bool) -> None:
    layer = _layer(bias)
    x = torch.randn(2, 3, 172, generator=torch.Generator().manual_seed(1))
    offset = 0 if layer.bias is None else layer.bias.double()
    expected = x.double() @ layer.quantized.dense().double().t() + offset
    assert torch.allclose(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_casting_the_model_leaves_scales_and_planes_as_stored(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(_layer())
    before = copy.deepcopy(model[0])
    model.to(dtype)
    layer = model[0]
    assert layer.alpha.dtype == torch.float16
    assert torch.equal(layer.alpha, before.alpha)
    assert torch.equal(layer.weight, before.weight)
    assert layer.bias.dtype == dtype
    assert dict(layer.named_buffers())["alpha"] is layer.alpha


def test_the_output_has_the_dtype_of_the_input_whatever_the_bias_has() -> None:
    layer = _layer()
    assert layer(torch.ones(1, 172, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.bfloat16()(torch.ones(1, 172)).dtype == torch.float32


def test_the_state_holds_weight_alpha_and_bias_under_the_names_that_models_store() -> None:
    state = _layer().state_dict()
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    assert shapes == {
        "weight": ((2, 5, 22), torch.uint8),
        "alpha": ((2, 5, 3), torch.float16),
        "bias": ((5,), torch.float32),
    }


def test_a_layer_on_the_meta_device_can_be_made_and_run() -> None:
    layer = FdbLinear(172, 5, 64, device="meta")
    assert layer(torch.empty(2, 172, device="meta")).shape == (2, 5)

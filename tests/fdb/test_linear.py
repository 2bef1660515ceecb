import copy

import pytest
import torch
from torch import Tensor

from dbllm_cli.errors import ConfigError
from dbllm_cli.fdb.fit import fit_scales
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.fdb.quantized import QuantizedMatrix, quantize_matrix
from dbllm_cli.kernels import cpu_kernels, dequantize


def _layer(bias: bool = True, in_features: int = 172) -> FdbLinear:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, in_features, generator=generator)
    quantized = quantize_matrix(matrix, fit_scales(matrix, 64, "als"), 64)
    layer = FdbLinear(in_features, 5, 64, bias)
    layer.load_state_dict(_stored(quantized), strict=False)
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
    layer = model.to(dtype)[0]
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.scales, before.scales)
    assert torch.equal(layer.weight, before.weight)
    assert layer.bias.dtype == dtype
    assert dict(layer.named_buffers())["scales"] is layer.scales


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


def test_a_layer_on_the_meta_device_can_be_made_and_run_and_is_not_tiled() -> None:
    layer = FdbLinear(172, 5, 64, device="meta")
    for _ in range(2):
        assert layer(torch.empty(2, 172, device="meta")).shape == (2, 5)
        layer.use_cpu_kernels()
        assert layer.tiles is None
        assert layer.weight.device.type == "meta"


# -- other levels ----------------------------------------------------------------------------------

_STORED = {
    "tied": {"weight": torch.uint8, "alpha": torch.float16},
    "offset": {"weight": torch.uint8, "alpha": torch.uint16, "row_exponent": torch.int8},
}


def _stored(quantized: QuantizedMatrix) -> dict[str, Tensor]:
    return {"weight": quantized.weight} | quantized.scheme.store(quantized.scales)


@pytest.mark.parametrize("levels", ["tied", "offset"])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_a_layer_runs_on_stored_scales_and_saves_what_it_read(
    levels: str, tiled: bool, cast: torch.dtype | None
) -> None:
    matrix = torch.randn(5, 172, generator=torch.Generator().manual_seed(0))
    quantized = quantize_matrix(matrix, fit_scales(matrix, 64, "als", levels=levels), 64, levels)
    stored = _stored(quantized)
    assert {name: tensor.dtype for name, tensor in stored.items()} == _STORED[levels]
    assert stored["alpha"].shape == (1, 5, 3)
    dense = dequantize(quantized.weight, quantized.scales, 172, 64, torch.float32)
    layer = FdbLinear(172, 5, 64, levels=levels)
    layer.load_state_dict(stored)
    if tiled:
        layer.use_cpu_kernels()
    layer.to(cast)
    x = torch.randn(3, 172, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), x @ dense.t(), rtol=1e-3, atol=1e-3)
    layer.load_state_dict({}, strict=False)
    assert torch.allclose(layer(x), x @ dense.t(), rtol=1e-3, atol=1e-3)
    again = layer.state_dict()
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("first", ["alpha", "row_exponent"])
@pytest.mark.parametrize("tiled", [False, True])
def test_codes_and_exponents_may_come_from_two_shards(first: str, tiled: bool) -> None:
    matrix, other = torch.randn(2, 5, 172, generator=torch.Generator().manual_seed(0))
    quantized, before = (
        quantize_matrix(m, fit_scales(m, 64, "als", levels="offset"), 64, "offset")
        for m in (matrix, other * 100)
    )
    stored = _stored(quantized)
    fresh, used = (FdbLinear(172, 5, 64, levels="offset") for _ in range(2))
    used.load_state_dict(_stored(before))
    if tiled:
        used.use_cpu_kernels()
    for layer in (fresh, used):
        layer.load_state_dict({first: stored[first]}, strict=False)
        rest = {name: tensor for name, tensor in stored.items() if name != first}
        layer.load_state_dict(rest, strict=False)
        assert torch.equal(layer.quantized.scales, quantized.scales)
    assert (used.tiles is not None) == (tiled and cpu_kernels() is not None)


# -- the layout of the compiled kernels -----------------------------------------------------------


def _tiled(bias: bool = True) -> FdbLinear:
    layer = _layer(bias)
    layer.use_cpu_kernels()
    if layer.tiles is None:
        pytest.skip("the CPU kernels are not compiled, or DBLLM_KERNEL asks for the reference")
    return layer


def _inputs(*batch: int) -> Tensor:
    return torch.randn(*batch, 172, generator=torch.Generator().manual_seed(1))


def _holds_the_same(layer: FdbLinear, other: FdbLinear) -> bool:
    planes, stored = layer.quantized, other.quantized
    return torch.equal(planes.weight, stored.weight) and torch.equal(planes.scales, stored.scales)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (40,)])
def test_the_compiled_kernels_give_the_output_of_before(bias: bool, batch: tuple[int, ...]) -> None:
    x, before = _inputs(*batch), _layer(bias)
    tiled = _tiled(bias)
    assert torch.allclose(tiled(x), before(x), rtol=1e-5, atol=1e-5)
    assert tiled.weight is None
    assert tiled.scales is None
    assert _holds_the_same(tiled, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_output_of_before(dtype: torch.dtype) -> None:
    expected, y = _layer()(_inputs(4)), _tiled()(_inputs(4).to(dtype))
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < 1e-2 * expected.norm()


def test_laying_out_twice_changes_nothing() -> None:
    layer = _tiled()
    tiles = layer.tiles
    layer.use_cpu_kernels()
    assert layer.tiles is tiles


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_of_a_tiled_layer_is_that_of_planes_and_scales(bias: bool) -> None:
    before, state = _layer(bias).state_dict(), _tiled(bias).state_dict()
    assert set(state) == set(before)
    for name, tensor in before.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    nested = torch.nn.ModuleDict({"layer": _tiled(bias)}).state_dict()
    assert set(nested) == {f"layer.{name}" for name in before}


@pytest.mark.parametrize("assign", [True, False])
def test_a_tiled_layer_loads_another_state(assign: bool) -> None:
    x, layer, other = _inputs(3), _tiled(), _layer()
    other.weight.bitwise_not_()
    other.scales.mul_(3)
    torch.nn.init.constant_(other.bias, 7)
    layer.load_state_dict(other.state_dict(), assign=assign)
    for _ in range(2):
        assert torch.allclose(layer(x), other(x), rtol=1e-5, atol=1e-4)
        assert _holds_the_same(layer, other)
        layer.use_cpu_kernels()
    assert layer.tiles is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_casts_and_copies_of_a_tiled_layer_keep_planes_and_scales(dtype: torch.dtype) -> None:
    x, before, layer = _inputs(3), _layer(), _tiled()
    expected = layer(x)
    copied = copy.deepcopy(layer)
    cast = torch.nn.Sequential(layer).to(dtype)[0]
    for each in (cast, copied):
        assert each.tiles is not None
        assert _holds_the_same(each, before)
    assert cast.bias.dtype == dtype
    assert torch.equal(copied(x), expected)
    near = 2e-2 if dtype.itemsize == 2 else 1e-5
    assert torch.allclose(cast(x.to(dtype)).float(), expected, rtol=near, atol=near)
    assert cast.float()(x).dtype == torch.float32


def test_a_copy_shares_nothing_with_the_layer() -> None:
    layer = _tiled()
    copied = copy.deepcopy(layer)
    layer.tiles.zero_()
    assert _holds_the_same(copied, _layer())


def test_on_another_device_a_tiled_layer_has_planes_and_scales_again() -> None:
    layer = _tiled().to("meta")
    assert layer.tiles is None
    assert (layer.weight.shape, layer.weight.dtype) == ((2, 5, 22), torch.uint8)
    assert (layer.scales.shape, layer.scales.dtype) == ((2, 5, 3), torch.float16)
    assert {t.device.type for t in (layer.weight, layer.scales, layer.bias)} == {"meta"}
    assert layer(torch.empty(2, 172, device="meta")).shape == (2, 5)


def test_a_group_size_without_a_kernel_leaves_the_layer_as_it_was() -> None:
    layer = FdbLinear(40, 5, 8)
    layer.weight.random_(0, 256)
    layer.alpha.normal_()
    weight, alpha, x = layer.weight, layer.alpha, torch.ones(2, 40)
    expected = layer(x)
    layer.use_cpu_kernels()
    assert layer.tiles is None
    assert layer.weight is weight
    assert layer.alpha is alpha
    assert torch.equal(layer(x), expected)


def test_without_compiled_kernels_the_layer_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dbllm_cli.fdb.linear.cpu_kernels", lambda: None)
    layer = _layer()
    layer.use_cpu_kernels()
    assert layer.tiles is None
    assert layer(_inputs(2)).shape == (2, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_float64_inputs_of_a_tiled_layer_are_computed_in_float64(bias: bool) -> None:
    x = _inputs(3).double().requires_grad_()
    y = _tiled(bias)(x)
    assert y.dtype == torch.float64
    assert torch.allclose(y, _layer(bias)(x.detach()), rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert x.grad is not None


def test_gradients_of_input_and_bias_pass_through_a_tiled_layer() -> None:
    grads = []
    for layer in (_layer(), _tiled()):
        x = _inputs(2, 3).requires_grad_()
        layer(x).square().sum().backward()
        grads.append((x.grad, layer.bias.grad))
    for before, after in zip(*grads, strict=True):
        assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)


def test_under_autocast_a_tiled_layer_computes_in_its_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = _tiled()(_inputs(2))
    assert y.dtype == torch.bfloat16


def test_planes_of_a_tiled_layer_are_read_under_any_default_device() -> None:
    layer, before = _tiled(), _layer()
    with torch.device("meta"):
        state = layer.state_dict()
    assert torch.equal(state["weight"], before.state_dict()["weight"])


def test_a_tiled_layer_without_its_kernels_says_so_when_it_is_unpickled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = _tiled()
    monkeypatch.setattr("dbllm_cli.fdb.linear.cpu_kernels", lambda: None)
    with pytest.raises(ConfigError, match="laid out for the CPU kernels"):
        copy.deepcopy(layer)

import pytest
import torch
from torch import Tensor

from dbllm_cli.kernels import dequantize, fdb_linear, unpack_planes

OUT, IN, GROUP = 5, 172, 64


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _packed() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    planes = torch.randint(256, (2, OUT, -(-IN // 8)), generator=generator, dtype=torch.uint8)
    scales = torch.rand(2, OUT, -(-IN // GROUP), generator=generator)
    return planes, (scales * torch.tensor([1.0, -1.0]).view(2, 1, 1)).half()


def _expected(x: Tensor, bias: Tensor | None) -> Tensor:
    """y = alpha1·(b1 x) + alpha2·(b2 x) + bias, in float64 and group by group."""
    weight, alpha = _packed()
    planes = unpack_planes(weight, IN, torch.float64)
    result = torch.zeros(*x.shape[:-1], OUT, dtype=torch.float64)
    for group in range(alpha.shape[-1]):
        columns = slice(group * GROUP, min((group + 1) * GROUP, IN))
        for plane in range(2):
            part = x.double()[..., columns] @ planes[plane, :, columns].t()
            result += alpha[plane, :, group].double() * part
    return result if bias is None else result + bias.double()


def _inputs() -> dict[str, Tensor]:
    return {
        "one row": _normal(1, IN),
        "a vector": _normal(IN),
        "batch and tokens": _normal(2, 3, IN),
        "no row": _normal(0, IN),
        "transposed": _normal(IN, 4).t(),
        "a slice": _normal(3, 2 * IN)[:, ::2],
    }


@pytest.mark.parametrize("name", list(_inputs()))
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_is_the_sum_of_two_binary_products(name: str, with_bias: bool) -> None:
    x, bias = _inputs()[name], _normal(OUT, seed=2) if with_bias else None
    y = fdb_linear(x, *_packed(), bias, GROUP)
    assert y.shape == (*x.shape[:-1], OUT)
    assert torch.allclose(y.double(), _expected(x, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_half_precision_inputs_give_their_own_dtype(dtype: torch.dtype, error: float) -> None:
    x, bias = _normal(3, IN).to(dtype), _normal(OUT, seed=2).to(dtype)
    y = fdb_linear(x, *_packed(), bias, GROUP)
    expected = _expected(x, bias)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("name", list(_inputs()))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_the_operator_keeps_torch_s_rules(name: str, with_bias: bool, trains: bool) -> None:
    x = _inputs()[name].requires_grad_(trains)
    bias = _normal(OUT, seed=2).requires_grad_(trains) if with_bias else None
    torch.library.opcheck(fdb_linear, (x, *_packed(), bias, GROUP))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_meta_device_only_shape_and_dtype_are_made(dtype: torch.dtype) -> None:
    weight, alpha = (tensor.to("meta") for tensor in _packed())
    y = fdb_linear(torch.empty(2, 3, IN, dtype=dtype, device="meta"), weight, alpha, None, GROUP)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, OUT), dtype, "meta")


@pytest.mark.parametrize("shape", [(4, IN), (2, 3, IN), (IN,)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_input_and_bias_are_those_of_the_dense_product(
    shape: tuple[int, ...], with_bias: bool
) -> None:
    x = _normal(*shape).requires_grad_()
    bias = _normal(OUT, seed=2).requires_grad_() if with_bias else None
    upstream = _normal(*shape[:-1], OUT, seed=3)
    fdb_linear(x, *_packed(), bias, GROUP).backward(upstream)
    dense = dequantize(*_packed(), IN, GROUP, torch.float64)
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), upstream.double() @ dense, rtol=1e-4, atol=1e-4)
    if bias is not None:
        assert bias.grad is not None
        assert torch.allclose(bias.grad, upstream.reshape(-1, OUT).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trains", [False, True])
def test_a_compiled_model_gives_the_same_and_leaves_eager_calls_working(trains: bool) -> None:
    """Twice and in between without compiling: nothing made while tracing may be kept."""
    torch.compiler.reset()

    def product(x: Tensor) -> Tensor:
        return fdb_linear(torch.relu(x), *packed, None, GROUP).square().sum()

    packed = _packed()
    x = _normal(3, IN)
    results = []
    for run in (
        torch.compile(product, backend="aot_eager", fullgraph=True),
        product,
        torch.compile(product, backend="aot_eager", fullgraph=True, dynamic=True),
    ):
        leaf = x.clone().requires_grad_(trains)
        value = run(leaf)
        if trains:
            value.backward()
        results.append((value.detach(), leaf.grad))
    for value, grad in results:
        assert torch.allclose(value, results[1][0])
        if trains:
            assert grad is not None
            assert torch.allclose(grad, results[1][1])

"""The packed product as torch operators.

`dbllm::fdb_linear` reads planes and scales as files hold them, on any device;
`dbllm::fdb_linear_tiled` is the same product in the layout of the compiled CPU kernels.
"""

import importlib.metadata
import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from dbllm_cli.kernels.cpu import TILED_DTYPES, cpu_kernels
from dbllm_cli.kernels.reference import dequantize, fdb_linear_reference
from dbllm_cli.machine.cpu_library import REFERENCE, VARIABLE


@torch.library.custom_op("dbllm::fdb_linear", mutates_args=())
def fdb_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """The product of a packed layer: `y = alpha1·(b1 x) + alpha2·(b2 x) + beta·(1 x) + bias`.

    Args:
        x: input, float32, bfloat16 or float16 `[..., in]`.
        weight: planes b1 and b2, uint8 `[2, out, ceil(in / 8)]`, least significant bit first.
        scales: scales alpha1 and alpha2, and the offset beta where there is one, floating
            `[2 or 3, out, groups]`.
        bias: `[out]` of x's dtype, or None.
        group_size: inputs that share their scales; the last group may be shorter.

    Returns:
        `[..., out]` of x's dtype.
    """
    return fdb_linear_reference(x, weight, scales, bias, group_size)


@fdb_linear.register_fake
def _fdb_linear_shape(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@fdb_linear.register_kernel("cuda")
def _fdb_linear_on_gpu(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    if x.dtype not in TILED_DTYPES or not has_gpu_kernel(x.device):
        return fdb_linear_reference(x, weight, scales, bias, group_size)
    from dbllm_cli.kernels.gpu import fdb_linear_gpu

    return fdb_linear_gpu(x, weight, scales, bias, group_size)


@cache
def has_gpu_kernel(device: torch.device) -> bool:
    """Whether products on this GPU run in Triton: from compute capability 8.0 on.

    DBLLM_KERNEL=reference forces the reference.
    """
    wanted = os.environ.get(VARIABLE) != REFERENCE and find_spec("triton") is not None
    if not wanted or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    # Triton 3.2 has no code for loads of three dimensions, and ends the process.
    return Version(importlib.metadata.version("triton")) >= Version("3.3")


def kernel_name(device: str) -> str:
    """What packed products on a device run in: a CPU's instruction set, `gpu`, or `reference`."""
    if device.startswith("cuda"):
        return "gpu" if has_gpu_kernel(torch.device(device)) else REFERENCE
    kernels = cpu_kernels() if device.startswith("cpu") else None
    return REFERENCE if kernels is None else kernels.instruction_set


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scales, bias, group_size = inputs
    ctx.save_for_backward(weight, scales)
    ctx.group_size = group_size
    ctx.in_features = x.shape[-1]
    ctx.has_bias = bias is not None


def _gradient_to_inputs(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scales = ctx.saved_tensors
    dense = dequantize(
        weight,
        scales,
        ctx.in_features,
        ctx.group_size,
        grad.dtype,
    )
    bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
    return grad @ dense, None, None, bias, None


fdb_linear.register_autograd(_gradient_to_inputs, setup_context=_keep_for_backward)


_TILED = torch.ops.dbllm.fdb_linear_tiled.default


def fdb_linear_tiled(
    x: Tensor, tiles: Tensor, in_features: int, out_features: int, group_size: int
) -> Tensor:
    """The product of a packed layer without bias, by the compiled kernels.

    bfloat16 and float16 activations are rounded to 13 bits in every group (AVX2: 12 bits;
    portable: not at all), which leaves the result within 1e-3; float32 ones are added as they
    are. An input that is not finite gives NaN.

    Args:
        x: input, float32, bfloat16 or float16 `[..., in]` on the CPU.
        tiles: from `CpuKernels.to_tiles`.
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        group_size: inputs that share their scales.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        ValueError: x has another number of inputs, or another dtype.
    """
    if x.shape[-1] != in_features or x.dtype not in TILED_DTYPES:
        raise ValueError(
            f"the layer takes {in_features} inputs in float32, bfloat16 or float16, "
            f"not {x.shape[-1]} in {x.dtype}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        product: Tensor = _TiledProduct.apply(x, tiles, out_features, group_size)
        return product
    result: Tensor = _TILED(x, tiles, out_features, group_size)
    return result


@torch.library.register_fake("dbllm::fdb_linear_tiled")  # type: ignore[untyped-decorator]
def _fdb_linear_tiled_shape(x: Tensor, tiles: Tensor, out_features: int, group_size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


class _TiledProduct(torch.autograd.Function):
    """The tiled product with its gradient to the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tiles: Tensor, out_features: int, group_size: int) -> Tensor:
        ctx.save_for_backward(tiles)
        ctx.shape = (x.shape[-1], out_features, group_size)
        result: Tensor = _TILED(x, tiles, out_features, group_size)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (tiles,) = ctx.saved_tensors
        return grad @ _dense_of_tiles(tiles, *ctx.shape).to(grad.dtype), None, None, None


@torch.library.custom_op("dbllm::dense_of_tiles", mutates_args=(), device_types="cpu")
def _dense_of_tiles(tiles: Tensor, in_features: int, out_features: int, group_size: int) -> Tensor:
    """The dequantized matrix, float32 `[out, in]`; an operator, so that compilers don't enter."""
    kernels = cpu_kernels()
    assert kernels is not None
    weight, scales = kernels.from_tiles(tiles, in_features, out_features, group_size)
    return dequantize(weight, scales, in_features, group_size, torch.float32).contiguous()


@_dense_of_tiles.register_fake
def _dense_of_tiles_shape(
    tiles: Tensor, in_features: int, out_features: int, group_size: int
) -> Tensor:
    return tiles.new_empty((out_features, in_features), dtype=torch.float32)

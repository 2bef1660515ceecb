"""Matrices in 8 bits: a row's integers, then its float16 scale; the embeddings of packed models."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from dbllm_cli.kernels.cpu import TILED_DTYPES, cpu_kernels

_LARGEST = 127
_SCALE_BYTES = 2
_LINEAR = torch.ops.dbllm.int8_linear.default


def quantize_rows(matrix: Tensor) -> Tensor:
    """Every row in 8-bit integers, its largest magnitude being 127.

    Args:
        matrix: floating `[rows, in]`.

    Returns:
        uint8 `[rows, in + 2]`: the bytes of the integers, then of the scale.
    """
    values = matrix.to(torch.float32)
    # The scale is rounded first, upwards enough that no integer exceeds the largest.
    scale = (values.abs().amax(-1, keepdim=True) / _LARGEST).to(torch.float16)
    divisor = torch.where(scale > 0, scale.to(torch.float32), 1.0)
    integers = (values / divisor).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return torch.cat((integers.view(torch.uint8), scale.view(torch.uint8)), -1)


def dequantize_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_rows`, `[..., in]` from `[..., in + 2]`."""
    integers = rows[..., :-_SCALE_BYTES].view(torch.int8)
    # A copy begins at an even address, as float16 must.
    scale = rows[..., -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
    scale = scale.view(torch.float16)
    return (integers.to(torch.float32) * scale.to(torch.float32)).to(dtype)


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` times the transpose of a matrix in 8 bits.

    The compiled CPU kernel rounds activations to 16 bits (relative error 2e-5); elsewhere the
    matrix is dequantized to x's dtype at every call.

    Args:
        x: input `[..., in]`.
        weight: from `quantize_rows`, uint8 `[rows, in + 2]`.

    Returns:
        `[..., rows]` of x's dtype.
    """
    compiled = x.device.type == "cpu" and x.dtype in TILED_DTYPES and _have_kernels()
    if compiled and not (torch.is_grad_enabled() and x.requires_grad):
        product: Tensor = _LINEAR(x, weight)
        return product
    return linear(x, dequantize_rows(weight, x.dtype))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _have_kernels() -> bool:
    return cpu_kernels() is not None


@torch.library.register_fake("dbllm::int8_linear")  # type: ignore[untyped-decorator]
def _int8_linear_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))

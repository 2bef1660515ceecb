"""Matrices in 8 bits: a row's integers, then its float16 scale; the embeddings of packed models."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from dbllm_cli.kernels.cpu import TILED_DTYPES, cpu_kernels

_LARGEST = 127
_SCALE_BYTES = 2
_PART_ROWS = 8192


def quantize_rows(matrix: Tensor) -> Tensor:
    """Every row in 8-bit integers, its largest magnitude being 127.

    Args:
        matrix: floating `[rows, in]`.

    Returns:
        uint8 `[rows, in + 2]`: the bytes of the integers, then of the scale.
    """
    values = matrix.to(torch.float32)
    # Integers belong to the rounded scale, the one that is stored.
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


@torch.library.custom_op("dbllm::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` times the transpose of a matrix in 8 bits.

    The compiled CPU kernel rounds activations to 16 bits (relative error 3e-5); elsewhere the
    matrix is dequantized to x's dtype at every call.

    Args:
        x: input `[..., in]`.
        weight: from `quantize_rows`, uint8 `[rows, in + 2]`.

    Returns:
        `[..., rows]` of x's dtype.

    Raises:
        ValueError: the rows do not fit x, or x is not floating.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"8-bit rows take floating inputs, not {x.dtype}: a model that casts to the dtype of "
            "its output layer's weight must be packed without --embeddings int8"
        )
    if weight.dim() != 2 or weight.dtype != torch.uint8 or x.shape[-1] + 2 != weight.shape[1]:
        raise ValueError(
            f"{x.shape[-1]} inputs take uint8 rows of {x.shape[-1] + 2} bytes, "
            f"not {weight.dtype} {list(weight.shape)}"
        )
    if x.device.type == "cpu" and x.dtype in TILED_DTYPES and cpu_kernels() is not None:
        product: Tensor = torch.ops.dbllm.int8_linear_cpu(x, weight.contiguous())
        return product
    # Part by part: a large vocabulary in float32 would outweigh the model.
    parts = (linear(x, dequantize_rows(part, x.dtype)) for part in weight.split(_PART_ROWS))
    return torch.cat(tuple(parts), -1)


@int8_linear.register_fake
def _int8_linear_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradient_to_inputs(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (weight,) = ctx.saved_tensors
    return grad @ dequantize_rows(weight, grad.dtype), None


int8_linear.register_autograd(_gradient_to_inputs, setup_context=_keep_for_backward)

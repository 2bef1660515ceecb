"""The operator `dbllm::fdb_linear`. Faster routes register for their device under the same name."""

from typing import Any

import torch
from torch import Tensor

from dbllm_cli.kernels.reference import dequantize, fdb_linear_reference


@torch.library.custom_op("dbllm::fdb_linear", mutates_args=())
def fdb_linear(
    x: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """The product of a packed layer: `y = alpha1·(b1 x) + alpha2·(b2 x) + bias`.

    Args:
        x: input, float32, bfloat16 or float16 `[..., in]`.
        weight: planes b1 and b2, uint8 `[2, out, ceil(in / 8)]`, least significant bit first.
        alpha: scales alpha1 and alpha2, floating `[2, out, groups]`.
        bias: `[out]` of x's dtype, or None.
        group_size: inputs that share two scales; the last group may be shorter.

    Returns:
        `[..., out]` of x's dtype.
    """
    return fdb_linear_reference(x, weight, alpha, bias, group_size)


@fdb_linear.register_fake
def _fdb_linear_shape(
    x: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, alpha, bias, group_size = inputs
    ctx.save_for_backward(weight, alpha)
    ctx.group_size = group_size
    ctx.in_features = x.shape[-1]
    ctx.has_bias = bias is not None


def _gradient_to_inputs(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, alpha = ctx.saved_tensors
    dense = dequantize(
        weight,
        alpha,
        ctx.in_features,
        ctx.group_size,
        grad.dtype,
    )
    bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
    return grad @ dense, None, None, bias, None


fdb_linear.register_autograd(_gradient_to_inputs, setup_context=_keep_for_backward)

"""Root-mean-square normalization on the CPU, in one pass instead of eight operators."""

import torch
from torch import Tensor

from dbllm_cli.kernels.cpu import TILED_DTYPES, cpu_kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight · x / sqrt(mean(x²) + eps)`, rounded to x's dtype before and after the weight.

    One compiled pass on the CPU where no gradient is asked for, else plain torch.

    Args:
        x: floating `[..., hidden]`.
        weight: `[hidden]`.
        eps: added to the mean square.

    Returns:
        `[..., hidden]`, of x's dtype where the weight has it too.
    """
    compiled = (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in TILED_DTYPES
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and cpu_kernels() is not None
    )
    if compiled:
        normalized: Tensor = torch.ops.dbllm.rms_norm_cpu(x, weight, eps)
        return normalized
    wide = x.to(torch.float32)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype)


@torch.library.register_fake("dbllm::rms_norm_cpu")  # type: ignore[untyped-decorator]
def _rms_norm_shape(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)

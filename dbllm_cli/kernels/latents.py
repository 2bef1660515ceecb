"""Dense weights from latent ones, and the gradients back, in one pass on the CPU.

Plain torch goes through the weights some thirty times for it, at every step of training.
"""

import torch
from torch import Tensor

from dbllm_cli.kernels.cpu import cpu_kernels

DENSE_DTYPES = (torch.float32, torch.bfloat16)


def can_round_latents(latent: Tensor, scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether `latent_levels` and `latent_gradients` take these."""
    return (
        latent.device.type == scales.device.type == "cpu"
        and latent.dtype == scales.dtype == torch.float32
        and dtype in DENSE_DTYPES
        and cpu_kernels() is not None
    )


def latent_levels(
    latent: Tensor, scales: Tensor, cells: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The level of every latent weight's cell.

    Args:
        latent: float32 `[out, in]`.
        scales: scales with `alpha2 <= 0 <= alpha1`, and the offset beta where there is one, float32
            `[2 or 3, out, groups]`.
        cells: scales whose levels part the latent weights, of the same shape.
        group_size: inputs that share their scales.
        dtype: of the result, float32 or bfloat16.

    Returns:
        Dense weights `[out, in]`.
    """
    dense: Tensor = torch.ops.dbllm.latent_levels_cpu(
        latent.contiguous(),
        scales.contiguous(),
        cells.contiguous(),
        group_size,
        dtype == torch.bfloat16,
    )
    return dense


def latent_gradients(
    dense: Tensor, latent: Tensor, scales: Tensor, cells: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Straight-through gradients, those of the scales summed over each plane, and of beta over all.

    Args:
        dense: gradient of the dense weights, float32 or bfloat16 `[out, in]`.
        latent: as given to `latent_levels`.
        scales: as given to `latent_levels`.
        cells: as given to `latent_levels`.
        group_size: inputs that share their scales.

    Returns:
        float32 gradients of `latent` and `scales`.
    """
    to_latent, to_alpha = torch.ops.dbllm.latent_gradients_cpu(
        dense.contiguous(), latent.contiguous(), scales.contiguous(), cells.contiguous(), group_size
    )
    return to_latent, to_alpha

"""Planes as bits: least significant bit first, rows padded to whole bytes with zeros."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_planes(planes: Tensor) -> Tensor:
    """Planes as bytes.

    Args:
        planes: bool `[..., in]`.

    Returns:
        uint8 `[..., ceil(in / 8)]`.
    """
    missing = -planes.shape[-1] % 8
    padded = pad(planes.to(torch.uint8), (0, missing)).unflatten(-1, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    packed: Tensor = (padded << shifts).sum(-1, dtype=torch.uint8)
    return packed

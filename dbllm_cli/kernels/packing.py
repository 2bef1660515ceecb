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


def _byte_bits(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The 8 bits of each byte value, least significant first: `[256, 8]`."""
    values = torch.arange(256, device=device).unsqueeze(-1)
    return ((values >> torch.arange(8, device=device)) & 1).to(dtype)


def unpack_planes(weight: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """Bit planes as numbers.

    Args:
        weight: uint8 `[..., ceil(in_features / 8)]`, least significant bit first.
        in_features: columns to keep; the rest of the last byte is padding.
        dtype: dtype of the result.

    Returns:
        0 or 1, `[..., in_features]`.
    """
    table = _byte_bits(weight.device, dtype)
    bits = table.index_select(0, weight.flatten().int())
    return bits.view(*weight.shape[:-1], -1)[..., :in_features]

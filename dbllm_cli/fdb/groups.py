"""A weight matrix cut into groups of inputs that share their scales."""

import math

from torch import Tensor
from torch.nn.functional import pad


def group_count(in_features: int, group_size: int) -> int:
    """Groups of one row; the last may be shorter than `group_size`."""
    return math.ceil(in_features / group_size)


def to_groups(matrix: Tensor, group_size: int) -> Tensor:
    """`[..., in]` as `[..., groups, group_size]`; a shorter last group is filled with zeros."""
    groups = group_count(matrix.shape[-1], group_size)
    missing = groups * group_size - matrix.shape[-1]
    if missing:
        matrix = pad(matrix, (0, missing))
    grouped: Tensor = matrix.unflatten(-1, (groups, group_size))
    return grouped


def from_groups(grouped: Tensor, in_features: int) -> Tensor:
    """The inverse of `to_groups`: `[..., groups, group_size]` as `[..., in_features]`."""
    return grouped.flatten(-2)[..., :in_features]

"""The scales that a group of weights may have: one file a scheme of levels, named after it.

Everything that depends on the scheme is asked of it here. A file's first line is its line in
`--help`, and `METHODS` are the ways of init-fdb that find its scales: `registry` reads both without
importing torch. Each file holds one `SCHEME`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor

from dbllm_cli.errors import StageFailedError
from dbllm_cli.fdb.groups import group_count


class Scheme(ABC):
    """A kind of levels.

    Expanded scales are float16 `[numbers, out, groups]`: alpha1, alpha2 and, where `numbers` is 3,
    the offset beta. Stored ones are what files hold, by the name that follows the layer's.

    Attributes:
        numbers: expanded numbers of a group, 2 or 3.
        format_version: of packed folders, the first that knows the scheme.
        trains_rounded: whether training feels the rounding of the scales: float16 is fine enough
            to leave it out.
        note: line of the model card; None for the paper's.
    """

    numbers: ClassVar[int] = 2
    format_version: ClassVar[int]
    trains_rounded: ClassVar[bool] = False
    note: ClassVar[str | None] = None

    @abstractmethod
    def fit(self, grouped: Tensor, importance: Tensor) -> Tensor:
        """Scales of the least weighted square error, by alternating least squares.

        Args:
            grouped: weights, float32 `[rows, groups, group_size]`.
            importance: weight of each error, broadcast to `grouped`.

        Returns:
            float32 `[numbers, rows, groups, 1]`.
        """

    @abstractmethod
    def project(self, scales: Tensor, upright: Tensor | None = None) -> Tensor:
        """Scales brought to what a group may have.

        Args:
            scales: `[numbers, ...]`.
            upright: where alpha1 + alpha2 may not be negative, bool `[...]`; elsewhere not
                positive. As it is when absent.
        """

    @abstractmethod
    def parts(self, out_features: int, groups: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """The stored tensors by name: dtype and shape."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the stored tensors."""
        return tuple(self.parts(0, 0))

    @abstractmethod
    def store(self, scales: Tensor) -> dict[str, Tensor]:
        """Allowed scales `[numbers, out, groups]` as files hold them, rounded."""

    @abstractmethod
    def expand(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `store`: float16 `[numbers, out, groups]`."""

    def train_gradient(self, scales: Tensor, gradient: Tensor) -> Tensor:
        """What training makes of the gradient to the scales, of their shape."""
        del scales
        return gradient

    def coarse_groups(self, scales: Tensor) -> Tensor:
        """Groups whose scales are stored with fewer digits, as others of their row are far larger.

        Args:
            scales: `[numbers, out, groups]`, rounded ones.

        Returns:
            bool `[out, groups]`.
        """
        return torch.zeros(scales.shape[1:], dtype=torch.bool, device=scales.device)

    def round(self, scales: Tensor) -> Tensor:
        """Scales projected and rounded to what is stored, as float16.

        Args:
            scales: `[numbers, out, groups]`.

        Raises:
            StageFailedError: a scale is not finite in float16.
        """
        allowed = self.project(scales.to(torch.float32))
        rounded = self.expand(self.store(allowed))
        # A code would be finite whatever it stands for.
        if not (torch.isfinite(allowed.to(torch.float16)) & torch.isfinite(rounded)).all():
            raise StageFailedError(
                "a scale is not finite in float16",
                "lower the learning rates, or leave the layer out",
            )
        return rounded

    def stored_bits(self, scales: Tensor) -> int:
        """Bits of scales `[numbers, out, groups]` as files hold them."""
        parts = self.parts(scales.shape[1], scales.shape[2]).values()
        return sum(torch.Size(shape).numel() * dtype.itemsize * 8 for dtype, shape in parts)

    def empty_stored(
        self, shape: tuple[int, int], group_size: int, device: torch.device | str | None
    ) -> dict[str, Tensor]:
        """Places for the stored tensors of a layer.

        Args:
            shape: `(in_features, out_features)`.
            group_size: inputs that share their scales.
            device: torch device.
        """
        parts = self.parts(shape[1], group_count(shape[0], group_size))
        return {name: torch.empty(s, dtype=d, device=device) for name, (d, s) in parts.items()}

    def is_stored(self, stored: Mapping[str, Tensor], out_features: int, groups: int) -> bool:
        """Whether tensors are of the names, dtypes and shapes that this scheme stores."""
        found = {name: (tensor.dtype, [*tensor.shape]) for name, tensor in stored.items()}
        return found == self.parts(out_features, groups)


@cache
def open_scheme(name: str) -> Scheme:
    """The scheme of this name."""
    scheme: Scheme = import_module(f"{__name__}.{name}").SCHEME
    return scheme


def keep_orientation(scales: Tensor, upright: Tensor) -> Tensor:
    """The nearest scales whose sum alpha1 + alpha2 has not the other sign.

    Args:
        scales: `[2 or 3, ...]`.
        upright: where the sum may not be negative, bool `[...]`; elsewhere not positive.
    """
    middle = scales[0] + scales[1]
    excess = torch.where(upright, middle.clamp(max=0), middle.clamp(min=0)) / 2
    return torch.cat((scales[:2] - excess, scales[2:]))

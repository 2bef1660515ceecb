"""A packed linear layer, as packed models hold it."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from dbllm_cli.errors import ConfigError
from dbllm_cli.fdb.quantized import QuantizedMatrix
from dbllm_cli.fdb.schemes import open_scheme
from dbllm_cli.kernels import TILED_DTYPES, cpu_kernels, fdb_linear, fdb_linear_tiled

_TILED_DEVICES = ("cpu", "meta")


def autocast_input(x: Tensor) -> Tensor:
    """`x` in the dtype that nn.Linear would compute in: autocast's where that is on."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)
    autocasts = available and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if autocasts else x


class FdbLinear(nn.Module):
    """`y = alpha1·(b1 x) + alpha2·(b2 x) + beta·(1 x) + bias` on packed planes.

    A layer is in one of three forms, each with buffers of its own, the others None:

    - stored: planes `weight` uint8 `[2, out, ceil(in / 8)]`, and scales as the scheme of levels
      stores them (`Scheme.parts`), `alpha` first. So it is made, read and saved.
    - expanded: `weight`, and `scales` float16 `[2 or 3, out, groups]`, by `expand`. They stay
      float16 when the model is cast, so that a cast never changes a weight.
    - tiled: `tiles`, planes and scales in the layout of the compiled kernels, by `use_cpu_kernels`.

    It goes from one to the next once it is known where it will run. Tiles become planes and scales
    again on another device, and any form a stored one where a state is loaded; it is then brought
    back to what it was.
    """

    weight: Tensor | None
    scales: Tensor | None
    tiles: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        levels: str = "plain",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.levels = levels
        self.scheme = open_scheme(levels)
        planes = torch.empty(
            2, out_features, -(-in_features // 8), dtype=torch.uint8, device=device
        )
        self.register_buffer("weight", planes)
        for name in self.scheme.part_names:
            self.register_buffer(name, None)
        self.register_buffer("scales", None, persistent=False)
        self.register_buffer("tiles", None, persistent=False)
        self._tiled_before = False
        self._unread: set[str] = set()
        self._make_stored(device)
        bias_values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if bias_values is None else nn.Parameter(bias_values)

    # -- the forms ---------------------------------------------------------------------------------

    @property
    def quantized(self) -> QuantizedMatrix:
        """The layer's planes and scales."""
        weight, scales = self._planes()
        return QuantizedMatrix(weight, scales, self.in_features, self.group_size, self.levels)

    def expand(self) -> None:
        """Make float16 of stored scales, once instead of at every call."""
        stored = self._stored()
        # Offloaded buffers come back as they are stored.
        if stored and not any(part.is_meta for part in stored.values()):
            self._set_stored({})
            self.scales = self.scheme.expand(stored)

    def use_cpu_kernels(self) -> None:
        """Lay planes and scales out for the compiled kernels, where there are any for the layer."""
        kernels = cpu_kernels()
        if kernels is None or self.weight is None or not kernels.fits(self.group_size):
            return
        if self.weight.device.type == "cpu":
            weight, scales = self._planes()
            self.tiles = kernels.to_tiles(weight, scales, self.in_features, self.group_size)
            self.weight = self.scales = None
            self._set_stored({})
            self._tiled_before = False

    def _leave_cpu_kernels(self) -> None:
        self.weight, self.scales = self._planes()
        self.tiles = None

    def _planes(self) -> tuple[Tensor, Tensor]:
        """Planes and float16 scales, whatever the form."""
        if self.tiles is not None:
            kernels = cpu_kernels()
            assert kernels is not None
            return kernels.from_tiles(
                self.tiles, self.in_features, self.out_features, self.group_size
            )
        assert self.weight is not None
        if self.scales is not None:
            return self.weight, self.scales
        return self.weight, self.scheme.expand(self._stored())

    def _stored(self) -> dict[str, Tensor]:
        """The stored scales by name; none in the other forms."""
        parts = {name: getattr(self, name) for name in self.scheme.part_names}
        return {name: part for name, part in parts.items() if part is not None}

    def _set_stored(self, stored: dict[str, Tensor]) -> None:
        for name in self.scheme.part_names:
            setattr(self, name, stored.get(name))

    def _make_stored(self, device: torch.device | str | None) -> None:
        """Make places for scales as they are stored, to be read."""
        shape = self.in_features, self.out_features
        self._set_stored(self.scheme.empty_stored(shape, self.group_size, device))
        self.scales = None
        self._unread = set(self.scheme.part_names)

    # -- the product -------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`, in x's dtype, or autocast's where that is on."""
        x = autocast_input(x)
        tiles, bias = self.tiles, self.bias
        if bias is not None:
            bias = bias.to(x.dtype)  # type: ignore[assignment]
        # Accelerate moves buffers without asking the module.
        if tiles is None or tiles.device.type not in _TILED_DEVICES or x.dtype not in TILED_DTYPES:
            weight, scales = (part.to(x.device) for part in self._planes())
            product: Tensor = fdb_linear(x, weight, scales, bias, self.group_size)
            return product
        result = fdb_linear_tiled(x, tiles, self.in_features, self.out_features, self.group_size)
        return result if bias is None else result + bias

    # -- casts, moves, states ----------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        if self.tiles is not None and fn(self.tiles[:0]).device.type != "cpu":
            self._leave_cpu_kernels()
        before = {"scales": self.scales, **self._stored()}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, held in before.items():
            moved = getattr(self, name)
            if held is not None and moved.dtype != held.dtype:
                setattr(self, name, held.to(moved.device))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._stored():
            return
        weight, scales = self._planes()
        state = {"weight": weight} | self.scheme.store(scales)
        destination.update({f"{prefix}{name}": tensor for name, tensor in state.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        scales = {name for name in self.scheme.part_names if f"{prefix}{name}" in state_dict}
        if self.tiles is not None and (scales or f"{prefix}weight" in state_dict):
            self._leave_cpu_kernels()
            self._tiled_before = True
        if scales and self.scales is not None:
            self._make_stored(self.scales.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        _, strict, missing = args[:3]
        if strict:  # torch sees the buffers of the present form alone
            names = [f"{prefix}{name}" for name in ("weight", *self.scheme.part_names)]
            missing += [n for n in names if n not in state_dict and n not in missing]
        # The scales may come in two calls, from two shards.
        self._unread -= scales
        if not self._unread:
            self.expand()
            if self._tiled_before:
                self.use_cpu_kernels()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # In a process of its own the operator waits for its implementation.
        if self.tiles is not None and cpu_kernels() is None:
            raise ConfigError(
                "this layer was laid out for the CPU kernels, which are not there",
                "load the model from its folder, or see dbllm doctor",
            )

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        shape = f"{self.in_features}, {self.out_features}, group_size={self.group_size}"
        return f"{shape}, {self.levels} levels"

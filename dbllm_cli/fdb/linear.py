"""A packed linear layer, as packed models hold it."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from dbllm_cli.errors import ConfigError
from dbllm_cli.fdb.groups import group_count
from dbllm_cli.fdb.quantized import QuantizedMatrix
from dbllm_cli.fdb.scales import LevelKind, expand_scales, stored_scales
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

    Buffers: `weight` uint8 `[2, out, ceil(in / 8)]`, `alpha` float16 `[2 or 3, out, groups]`. The
    scales stay float16 when the model is cast, so that a cast never changes a weight.

    `alpha` is read and saved as `levels` are stored (`fdb.scales.stored_scales`), with an offset
    beside `row_exponent` int8 `[out]`. Until `expand_scales` makes float16 of it every call does.

    `use_cpu_kernels` replaces planes and scales by one buffer `tiles` in the layout of the compiled
    kernels; what is saved, read or moved to another device is planes and scales again.
    """

    weight: Tensor | None
    alpha: Tensor | None
    row_exponent: Tensor | None
    tiles: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        levels: LevelKind = "plain",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        planes = torch.empty(
            2, out_features, -(-in_features // 8), dtype=torch.uint8, device=device
        )
        self.levels: LevelKind = levels
        self.register_buffer("weight", planes)
        self.register_buffer("alpha", self._empty_scales(device))
        self.register_buffer("row_exponent", self._no_exponents(device))
        self.register_buffer("tiles", None, persistent=False)
        self._lacking = self._stored_scales()
        self._tile_again = False
        bias_values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if bias_values is None else nn.Parameter(bias_values)

    @property
    def quantized(self) -> QuantizedMatrix:
        """The layer's planes and scales."""
        weight, alpha = self._planes()
        return QuantizedMatrix(weight, alpha, self.in_features, self.group_size, self.levels)

    def _empty_scales(self, device: torch.device | str | None) -> Tensor:
        """A place for scales as they are stored."""
        groups = group_count(self.in_features, self.group_size)
        numbers = 2 if self.levels == "plain" else 1
        dtype = torch.uint16 if self.levels == "offset" else torch.float16
        return torch.empty(numbers, self.out_features, groups, dtype=dtype, device=device)

    def _no_exponents(self, device: torch.device | str | None) -> Tensor | None:
        """A place for what the codes of the rows are in units of."""
        coded = self.levels == "offset"
        return torch.empty(self.out_features, dtype=torch.int8, device=device) if coded else None

    def expand_scales(self) -> None:
        """Make float16 of stored scales, once instead of at every call."""
        # Offloaded buffers come back as they are stored.
        if self.tiles is None and self.alpha is not None and not self.alpha.is_meta:
            _, self.alpha = self._planes()
            self.row_exponent = None
            self._lacking = set()

    def use_cpu_kernels(self) -> None:
        """Lay planes and scales out for the compiled kernels, where there are any for the layer."""
        kernels = cpu_kernels()
        if kernels is None or self.weight is None or not kernels.fits(self.group_size):
            return
        weight, alpha = self._planes()
        if weight.device.type == "cpu":
            self.tiles = kernels.to_tiles(weight, alpha, self.in_features, self.group_size)
            self.weight = self.alpha = self.row_exponent = None
            self._lacking, self._tile_again = set(), False

    def _planes(self) -> tuple[Tensor, Tensor]:
        if self.tiles is not None:
            kernels = cpu_kernels()
            assert kernels is not None
            return kernels.from_tiles(
                self.tiles, self.in_features, self.out_features, self.group_size
            )
        assert self.weight is not None
        assert self.alpha is not None
        return self.weight, expand_scales(self.alpha, self.row_exponent)

    def _leave_cpu_kernels(self) -> None:
        self.weight, self.alpha = self._planes()
        self.tiles = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`, in x's dtype, or autocast's where that is on."""
        x = autocast_input(x)
        tiles, bias = self.tiles, self.bias
        if bias is not None:
            bias = bias.to(x.dtype)  # type: ignore[assignment]
        # Accelerate moves buffers without asking the module.
        if tiles is None or tiles.device.type not in _TILED_DEVICES or x.dtype not in TILED_DTYPES:
            weight, alpha = (part.to(x.device) for part in self._planes())
            product: Tensor = fdb_linear(x, weight, alpha, bias, self.group_size)
            return product
        result = fdb_linear_tiled(x, tiles, self.in_features, self.out_features, self.group_size)
        return result if bias is None else result + bias

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        if self.tiles is not None and fn(self.tiles[:0]).device.type != "cpu":
            self._leave_cpu_kernels()
        before = self.alpha
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if before is not None and self.alpha is not None and self.alpha.dtype != before.dtype:
            self.alpha = before.to(self.alpha.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight, alpha = self._planes()
        destination[f"{prefix}weight"] = weight
        destination[f"{prefix}alpha"], exponents = stored_scales(alpha, self.levels)
        if exponents is not None:
            destination[f"{prefix}row_exponent"] = exponents

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        parts = {"weight", *self._stored_scales()}
        given = {part for part in parts if f"{prefix}{part}" in state_dict}
        if given and self.tiles is not None:
            self._leave_cpu_kernels()
            self._tile_again = True
        if given - {"weight"}:
            self._take_stored_scales()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # Codes and exponents may come in two calls, from two shards.
        self._lacking -= given
        if not self._lacking:
            self.expand_scales()
            if self._tile_again:
                self.use_cpu_kernels()

    def _stored_scales(self) -> set[str]:
        return {"alpha", "row_exponent"} if self.levels == "offset" else {"alpha"}

    def _take_stored_scales(self) -> None:
        """Make places for scales as they are stored, where they are expanded now."""
        if not self._lacking:
            assert self.alpha is not None
            device = self.alpha.device
            self.alpha, self.row_exponent = self._empty_scales(device), self._no_exponents(device)
            self._lacking = self._stored_scales()

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
        return shape if self.levels == "plain" else f"{shape}, {self.levels} levels"

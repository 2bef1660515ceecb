"""A packed linear layer, as packed models hold it."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from dbllm_cli.fdb.groups import group_count
from dbllm_cli.fdb.quantized import QuantizedMatrix
from dbllm_cli.kernels import fdb_linear


def autocast_input(x: Tensor) -> Tensor:
    """`x` in the dtype that nn.Linear would compute in: autocast's where that is on."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)
    autocasts = available and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if autocasts else x


class FdbLinear(nn.Module):
    """`y = alpha1·(b1 x) + alpha2·(b2 x) + bias` on packed planes.

    Buffers: `weight` uint8 `[2, out, ceil(in / 8)]`, `alpha` float16 `[2, out, groups]`. The scales
    stay float16 when the model is cast, so that a cast never changes a weight.
    """

    weight: Tensor
    alpha: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        planes = torch.empty(
            2, out_features, -(-in_features // 8), dtype=torch.uint8, device=device
        )
        groups = group_count(in_features, group_size)
        scales = torch.empty(2, out_features, groups, dtype=torch.float16, device=device)
        self.register_buffer("weight", planes)
        self.register_buffer("alpha", scales)
        bias_values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if bias_values is None else nn.Parameter(bias_values)

    @property
    def quantized(self) -> QuantizedMatrix:
        """The layer's planes and scales."""
        return QuantizedMatrix(self.weight, self.alpha, self.in_features, self.group_size)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`, in x's dtype, or autocast's where that is on."""
        x = autocast_input(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = fdb_linear(x, self.weight, self.alpha, bias, self.group_size)
        return product

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        stored = self.alpha
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.alpha.dtype != stored.dtype:
            self.alpha = stored.to(self.alpha.device)
        return self

    @classmethod
    def holding(cls, quantized: QuantizedMatrix, bias: Tensor | None) -> Self:
        """A layer with these planes and scales, and a frozen bias."""
        _, out_features, _ = quantized.weight.shape
        layer = cls(quantized.in_features, out_features, quantized.group_size, device="meta")
        layer.weight, layer.alpha = quantized.weight, quantized.alpha
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}"

"""Random packed layers and their product by arithmetic of the tests' own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbllm_cli.kernels import cpu_kernels, fdb_linear_tiled

Array = npt.NDArray[np.float64]

REPOSITORY = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Largest relative error of rounding a number to the dtype, and half its smallest denormal.
ROUNDING = {
    torch.float32: (2**-24, 2.0**-150),
    torch.bfloat16: (2**-8, 2.0**-134),
    torch.float16: (2**-11, 2.0**-25),
}
# Of the sums, before they are rounded to the output's dtype.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Layer:
    """Random planes and scales, and their product by arithmetic of its own."""

    planes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    in_features: int
    group_size: int

    @property
    def out_features(self) -> int:
        return self.planes.shape[1]

    @property
    def tiles(self) -> Tensor:
        kernels = cpu_kernels()
        assert kernels is not None
        weight, alpha = torch.from_numpy(self.planes), torch.from_numpy(self.scales)
        return kernels.to_tiles(weight, alpha, self.in_features, self.group_size)

    def __call__(self, x: Tensor) -> Tensor:
        return fdb_linear_tiled(x, self.tiles, self.in_features, self.out_features, self.group_size)

    def dense(self) -> Array:
        """`alpha1·b1 + alpha2·b2 + beta`, `[out, in]`."""
        bits = np.unpackbits(self.planes, axis=-1, bitorder="little")[..., : self.in_features]
        scales = self._scales()
        dense: Array = (bits * scales[:2]).sum(0) + scales[2:].sum(0)
        return dense

    def expected(self, x: Tensor) -> Array:
        return x.detach().double().numpy() @ self.dense().T

    def sizes(self, x: Tensor) -> Array:
        """How large the outputs are, had no term another's opposite sign."""
        squares = (self._scales() ** 2).sum(0)
        return np.sqrt(x.detach().double().numpy() ** 2 @ squares.T)

    def _scales(self) -> Array:
        wide = np.repeat(self.scales.astype(np.float64), self.group_size, axis=-1)
        return wide[..., : self.in_features]


def random_layer(
    in_features: int,
    out_features: int,
    group_size: int,
    seed: int = 0,
    scale: float = 0.1,
    offset: bool = False,
) -> Layer:
    """Bits beyond the last input are random too: files may hold any there."""
    draw = np.random.default_rng(seed)
    shape = (3 if offset else 2, out_features, -(-in_features // group_size))
    planes = draw.integers(0, 256, (2, out_features, -(-in_features // 8)), dtype=np.uint8)
    spread = 2.0 ** draw.integers(-5, 3, shape)
    scales = (draw.normal(size=shape) * spread * scale).astype(np.float16)
    return Layer(planes, scales, in_features, group_size)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(y: Tensor, x: Tensor, layer: Layer) -> None:
    """No further off in norm than the kernel's own error and one rounding of the output."""
    expected = layer.expected(x)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    relative, denormal = ROUNDING[x.dtype]
    if x.dtype == torch.float32:
        relative = 0
        denormal *= 4 * layer.scales.shape[-1]
    allowed = (
        ERROR[x.dtype] * np.linalg.norm(layer.sizes(x))
        + relative * np.linalg.norm(expected)
        + denormal * np.sqrt(expected.size)
    )
    assert np.linalg.norm(y.double().numpy() - expected) <= allowed

"""The products that the GPU kernels are tested with, and a float64 reference of them."""

import itertools
import random
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The interpreter cuts bfloat16 off instead of rounding it.
ERROR = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}


class Case(NamedTuple):
    inputs: int
    outputs: int
    group_size: int
    rows: int
    dtype: torch.dtype = torch.float16
    bias: bool = False
    layout: str = "rows"
    offset: bool = False

    @property
    def name(self) -> str:
        return "-".join(str(part).removeprefix("torch.") for part in self)


class Layer(NamedTuple):
    x: Tensor
    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    group_size: int

    def to(self, device: str) -> "Layer":
        bias = None if self.bias is None else self.bias.to(device)
        x, weight, alpha = (part.to(device) for part in (self.x, self.weight, self.scales))
        return Layer(x, weight, alpha, bias, self.group_size)


def all_cases() -> list[Case]:
    """Odd shapes in all combinations; then the edges between blocks, rows and layouts."""
    draw = random.Random(0)  # noqa: S311 -- choices of tests
    sizes = itertools.product([172, 40, 1000], [8, 32, 64, 128], [1, 3, 17, 40])
    odd = [
        Case(
            inputs,
            draw.choice([5, 33, 100]),
            group,
            rows,
            draw.choice([*ERROR]),
            draw.random() < 0.5,
            offset=draw.random() < 0.5,
        )
        for inputs, group, rows in sizes
    ]
    edges = [Case(256, 33, 64, rows) for rows in (0, 2, 4, 5, 16, 64, 65, 130)]
    whole = [
        Case(2048, 16, 64, rows, dtype, offset=offset)
        for rows in (1, 8, 70)
        for dtype in ERROR
        for offset in (False, True)
    ]
    float32 = [Case(172, 33, 64, rows, torch.float32) for rows in (5, 70)]
    groups = [Case(128, 9, group, rows) for group in (8, 24, 96) for rows in (2, 6)]
    small = [Case(8, 1, 8, rows, bias=True) for rows in (1, 40)] + [Case(13, 3, 8, 1)]
    layouts = ("vector", "batch", "transposed", "every second", "odd planes")
    kinds = [Case(160, 9, 32, rows, layout=layout) for layout in layouts for rows in (2, 6)]
    broken = [Case(172, 9, 64, rows, d, layout="NaN") for rows in (3, 20) for d in ERROR]
    return [*odd, *edges, *whole, *float32, *groups, *small, *kinds, *broken]


CASES = all_cases()


def _amid_nan(values: Tensor) -> Tensor:
    """A view of the values, with NaN before and behind: whoever reads beyond them will show it."""
    room = torch.full((len(values) + 2, *values.shape[1:]), torch.nan, dtype=values.dtype)
    room[1:-1] = values
    return room[1:-1]


def random_layer(case: Case) -> Layer:
    """Random bits, in the padding too."""
    draw = torch.Generator().manual_seed(case.inputs + case.rows)
    byte_columns, groups = -(-case.inputs // 8), -(-case.inputs // case.group_size)
    planes = torch.randint(256, (2, case.outputs, byte_columns), generator=draw, dtype=torch.uint8)
    if case.layout == "odd planes":
        planes = torch.cat([torch.zeros(1, dtype=torch.uint8), planes.flatten()])[1:].view_as(
            planes
        )
    least = torch.tensor([0.0, -1.0, -0.5])[: 3 if case.offset else 2].view(-1, 1, 1)
    scales = torch.rand(len(least), case.outputs, groups, generator=draw) + least
    x = torch.randn(case.rows, case.inputs, generator=draw)
    if case.layout == "NaN":
        planes[:, 0] = 0
        x[1, 70] = torch.nan
    bias = torch.randn(case.outputs, generator=draw).to(case.dtype) if case.bias else None
    x = _laid_out(_amid_nan(x.to(case.dtype)), case.layout)
    return Layer(x, planes, _amid_nan(scales.half()), bias, case.group_size)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "vector":
        return x[0]
    if layout == "batch":
        return x.view(2, -1, x.shape[-1])
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "every second":
        return x.repeat_interleave(2, dim=1)[:, ::2]
    return x


def expected_product(layer: Layer) -> NDArray[np.float64]:
    """y = alpha1·(b1 x) + alpha2·(b2 x) + beta·(1 x) + bias in float64, from the bytes."""
    x, weight, alpha = layer.x.double().numpy(), layer.weight.numpy(), layer.scales.double().numpy()
    bits = np.unpackbits(weight, axis=-1, bitorder="little")[..., : x.shape[-1]]
    scales = np.repeat(alpha, layer.group_size, axis=-1)[..., : x.shape[-1]]
    y: NDArray[np.float64] = x @ ((bits * scales[:2]).sum(0) + scales[2:].sum(0)).T
    return y if layer.bias is None else y + layer.bias.double().numpy()


def check_product(result: Tensor, case: Case) -> None:
    layer = random_layer(case)
    assert (result.shape, result.dtype) == ((*layer.x.shape[:-1], case.outputs), case.dtype)
    expected = expected_product(layer)
    got = result.double().cpu().numpy()
    assert (np.isnan(got) == np.isnan(expected)).all()
    error = np.linalg.norm(np.nan_to_num(got - expected))
    assert error <= ERROR[case.dtype] * np.linalg.norm(np.nan_to_num(expected))

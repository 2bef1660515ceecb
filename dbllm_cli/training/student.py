"""Layers that train, and those that are finished, in the place of a block's linear layers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.fdb.quantized import QuantizedMatrix, latent_start
from dbllm_cli.llm.blocks import matrix_of
from dbllm_cli.llm.quantized_folder import PackedFolder
from dbllm_cli.training.layers import LatentLinear, ScaleLinear, TrainableLinear

_MARGIN = 0.2
"""Of a cell: how far from its borders latent weights start where cells are fixed.

`reconstruct` leaves many at a border, where any gradient would turn them over. From farther away
only gradients that agree over many steps do. One beyond the bounds of the straight-through gradient
stays out: brought back to them it was no better (stories260K, held-out 1.915 against 1.913).
"""


def latent_layer(
    student: PackedFolder,
    name: str,
    quantized: QuantizedMatrix,
    teacher: Tensor,
    bias: Tensor | None,
    fixed_cells: bool = False,
) -> LatentLinear:
    """A layer that trains latent weights and scales.

    Args:
        student: the fdb artifact.
        name: the layer.
        quantized: its planes and scales.
        teacher: its full-precision matrix `[out, in]`.
        bias: its bias, or None.
        fixed_cells: as `LatentLinear` takes it; latent weights then start away from the borders.
    """
    device = teacher.device
    on_device = replace(
        quantized, weight=quantized.weight.to(device), scales=quantized.scales.to(device)
    )
    latent = student.latent(name, on_device, teacher).to(device)
    if fixed_cells:
        latent = latent_start(on_device, latent, _MARGIN)
    return LatentLinear(on_device, latent, bias, fixed_cells)


def set_dense_layer(
    block: nn.Module, name: str, quantized: QuantizedMatrix, dtype: torch.dtype
) -> None:
    """Put a layer that is finished, dense, in its place: it does not change from batch to batch.

    Args:
        block: what holds the layer.
        name: of the layer within the block; the bias that it has stays.
        quantized: its planes and scales.
        dtype: of the weights.
    """
    bias = cast("Tensor | None", getattr(block.get_submodule(name), "bias", None))
    shape = quantized.in_features, quantized.weight.shape[1]
    layer = nn.Linear(*shape, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(quantized.dense(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    block.set_submodule(name, layer)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, FdbLinear]]:
    """Name and module of every packed layer."""
    for name, module in model.named_modules():
        if isinstance(module, FdbLinear):
            yield name, module


def unquantized_parameters(
    model: nn.Module, blocks: nn.Module, which: str
) -> Mapping[str, nn.Parameter]:
    """The parameters outside the quantized layers that are to be trained, made to take gradients.

    Matrices of the blocks, such as layers that were left out, stay as they are.

    Args:
        model: after `make_trainable`.
        blocks: its decoder blocks.
        which: `frozen`, none; `norms`, all vectors; `all`, those and all that is not in the blocks.

    Returns:
        Name -> parameter, one that is tied under all of its names.
    """
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, TrainableLinear)
        for parameter in module.parameters()
    }
    of_blocks = {id(parameter) for parameter in blocks.parameters()}
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in inside
        and which != "frozen"
        and (parameter.dim() == 1 or (which == "all" and id(parameter) not in of_blocks))
    }
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def make_trainable(
    model: nn.Module,
    student: PackedFolder,
    teacher: nn.Module | None,
) -> Mapping[str, TrainableLinear]:
    """Replace every packed layer of a model by one that trains.

    Args:
        model: an fdb artifact loaded to train, changed in place.
        student: the artifact it was loaded from.
        teacher: the full-precision model, to train latent weights; None trains scales alone.

    Returns:
        Name -> layer.
    """
    layers: dict[str, TrainableLinear] = {}
    for name, packed in list(packed_layers(model)):
        bias = packed.bias
        if teacher is None:
            layers[name] = ScaleLinear(packed.quantized, bias)
        else:
            original = teacher.get_submodule(name)
            weight = original.weight
            assert isinstance(weight, Tensor)
            matrix = matrix_of(original, weight.detach())
            layers[name] = latent_layer(
                student, name, packed.quantized, matrix, bias, fixed_cells=True
            )
        model.set_submodule(name, layers[name])
    return layers


@contextmanager
def as_stored(
    layers: Iterable[TrainableLinear], others: Iterable[nn.Parameter], dtype: torch.dtype
) -> Iterator[None]:
    """Scales and unquantized parameters rounded to what the artifact holds, for a while.

    Args:
        layers: those that train.
        others: parameters outside of them that train.
        dtype: what these are stored in.
    """
    layers, others = list(layers), list(others)
    exact = [(each, each.data) for each in (*others, *(layer.scales for layer in layers))]
    for parameter in others:
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    for layer in layers:
        layer.scales.data = layer.rounded_scales().detach()
    try:
        yield
    finally:
        for parameter, data in exact:
            parameter.data = data

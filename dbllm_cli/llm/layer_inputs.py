"""What the linear layers of one decoder block get as inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def layers_by_input(
    block: nn.Module, names: Sequence[str], run: Callable[[], object]
) -> list[list[str]]:
    """A block's layers in the order of their calls, those that share an input together.

    Args:
        block: the decoder block.
        names: of its layers, relative to the block.
        run: runs the block once, on any hidden states.
    """
    inputs: list[Tensor] = []
    shared: list[list[str]] = []

    def meet(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            for known, together in zip(inputs, shared, strict=True):
                if known is args[0]:
                    together.append(name)
                    return
            inputs.append(args[0])
            shared.append([name])

        return keep

    handles = [block.get_submodule(n).register_forward_pre_hook(meet(n)) for n in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return shared


@torch.no_grad()
def weighted_gram(
    block: nn.Module,
    layer: nn.Module,
    in_features: int,
    token_weights: Sequence[Tensor],
    run: Callable[[], object],
) -> Tensor:
    """XᵀX of a layer's inputs, float32 `[in, in]`, tokens weighted.

    Args:
        block: the decoder block, called once a batch.
        layer: a layer of it.
        in_features: inputs of the layer.
        token_weights: of each batch `[batch, tokens]`, on the device of the inputs; ignored where
            the layer does not get every token.
        run: runs the block on all batches in that order.
    """
    device = token_weights[0].device
    gram = torch.zeros(in_features, in_features, device=device)
    batches = iter(token_weights)
    weights = token_weights[0]

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal weights
        del module, args
        weights = next(batches)

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        x, own = args[0].to(torch.float32).flatten(0, -2), weights.flatten()
        if len(x) == len(own):
            x = x * own.sqrt().unsqueeze(-1)
        # Under autocast the sums would be bfloat16.
        with torch.autocast(device.type, enabled=False):
            gram.addmm_(x.T, x)

    handles = [block.register_forward_pre_hook(begin), layer.register_forward_pre_hook(add)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return gram

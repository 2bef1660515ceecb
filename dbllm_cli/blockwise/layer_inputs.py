"""What the linear layers of one decoder block get as inputs."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress

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


def uncalled_layers(model: nn.Module, names: Collection[str]) -> list[str]:
    """Layers that a model does not call: it reads their weights by itself, as Mamba does dt_proj's.

    Args:
        model: on the meta device.
        names: of the layers.

    Returns:
        Their names in order; none where the model can't run on the meta device.
    """
    called: set[str] = set()
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name in names
    ]
    try:
        # Without a cache transformers looks into the positions, which are not there.
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"), use_cache=True)
    except Exception:  # noqa: BLE001  what a family does with its tokens is its own
        return []
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in names if name not in called]


class _Reached(Exception):  # noqa: N818
    """The layer has its input: the rest of the block need not run."""


@torch.no_grad()
def weighted_gram(
    layer: nn.Module,
    in_features: int,
    token_weights: Sequence[Tensor],
    batches: Iterable[Tensor],
    run: Callable[[Tensor], object],
) -> Tensor:
    """XᵀX of a layer's inputs, float32 `[in, in]`, tokens weighted; of its first call in a block.

    Args:
        layer: a layer of a decoder block.
        in_features: inputs of the layer.
        token_weights: of each batch `[batch, tokens]`, on the device of the inputs; ignored where
            the layer does not get every token.
        batches: hidden states that enter the block `[batch, tokens, hidden]`.
        run: runs the block on a batch; it is left as soon as the layer is reached.
    """
    device = token_weights[0].device
    gram = torch.zeros(in_features, in_features, device=device)
    own = token_weights[0]

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        del module
        x = args[0].to(torch.float32).flatten(0, -2)
        if len(x) == own.numel():
            x = x * own.flatten().sqrt().unsqueeze(-1)
        gram.addmm_(x.T, x)
        raise _Reached

    handle = layer.register_forward_pre_hook(add)
    try:
        for own, batch in zip(token_weights, batches, strict=True):  # noqa: B007
            with suppress(_Reached):
                run(batch)
    finally:
        handle.remove()
    return gram

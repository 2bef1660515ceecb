"""A model's decoder blocks and their linear layers, found by structure, not by a table of names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dbllm_cli.errors import ConfigError
from dbllm_cli.fdb.linear import FdbLinear

_MOST_OTHERS = 0.05
"""Weights outside linear layers, as a share of those within: fused experts are far more, the states
of a state-space layer far fewer."""


@dataclass(frozen=True)
class DecoderBlocks:
    """The list of decoder blocks: `modules[i]` is named `<prefix>.<i>` in the model."""

    prefix: str
    modules: nn.ModuleList

    def __len__(self) -> int:
        return len(self.modules)

    def name(self, index: int) -> str:
        """Full name of a block."""
        return f"{self.prefix}.{index}"

    def linear_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Full name and module of every linear layer in the blocks, in order."""
        for index, block in enumerate(self.modules):
            for name, module in block.named_modules():
                if is_linear(module):
                    yield f"{self.name(index)}.{name}", module


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one that dbllm quantizes: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def matrix_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as `[out, in]`; also the inverse. GPT-2's Conv1D stores `[in, out]`."""
    return weight.t().contiguous() if isinstance(module, Conv1D) else weight


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a linear layer."""
    shape = cast(Tensor, module.weight).shape
    first, second = int(shape[0]), int(shape[1])
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def _weight_count(layer: nn.Module) -> int:
    if isinstance(layer, FdbLinear):
        return layer.in_features * layer.out_features
    return cast(Tensor, layer.weight).numel()


def find_blocks(model: nn.Module) -> DecoderBlocks:
    """The outermost module list whose members hold the most linear weights, packed or not.

    Raises:
        ConfigError: no module list holds a linear layer.
    """
    best: DecoderBlocks | None = None
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        weights = sum(
            _weight_count(part)
            for part in module.modules()
            if is_linear(part) or isinstance(part, FdbLinear)
        )
        if weights > most:
            best, most = DecoderBlocks(name, module), weights
    if best is None:
        raise ConfigError(
            f"{type(model).__name__} has no list of blocks with linear layers",
            "dbllm quantizes decoder-only transformers models",
        )
    return best


def select_layers(
    blocks: DecoderBlocks, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, nn.Module]:
    """The linear layers whose names match `include` and not `exclude` (shell wildcards).

    Raises:
        ConfigError: nothing matches, or blocks hold many weights that are no linear layer's, such
            as fused experts, which would be left in full precision unsaid.
    """
    selected = {
        name: module
        for name, module in blocks.linear_layers()
        if _matches(name, include) and not _matches(name, exclude)
    }
    if not selected:
        raise ConfigError(
            f"no linear layer matches include {list(include)} without exclude {list(exclude)}",
            f"names look like {next(blocks.linear_layers())[0]}",
        )
    _refuse_other_weights(blocks, exclude)
    return selected


def _refuse_other_weights(blocks: DecoderBlocks, exclude: Sequence[str]) -> None:
    linear = sum(_weight_count(module) for _, module in blocks.linear_layers())
    others: dict[str, tuple[nn.Module, int]] = {}
    for index, block in enumerate(blocks.modules):
        for name, module in block.named_modules():
            full = f"{blocks.name(index)}.{name}"
            weights = _other_weights(module)
            if weights and not _matches(full, exclude):
                others[full] = module, weights
    if sum(weights for _, weights in others.values()) > _MOST_OTHERS * linear:
        full, (module, weights) = max(others.items(), key=lambda item: item[1][1])
        raise ConfigError(
            f"{full} ({type(module).__name__}) holds {weights:,} weights outside linear layers, as "
            "experts fused into one tensor are, which dbllm can't quantize",
            f"leave such modules in full precision with --exclude '*.{full.rpartition('.')[2]}'",
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _other_weights(module: nn.Module) -> int:
    """How many weights in matrices a module holds itself that belong to no layer known here."""
    if is_linear(module) or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding):
        return 0
    return sum(own.numel() for own in module.parameters(recurse=False) if own.ndim >= 2)


@dataclass(frozen=True)
class BlockCall:
    """The arguments that a model's forward gives one block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for `hidden` `[batch, tokens, hidden]`."""
        output = block(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def same_arguments(first: Any, second: Any) -> bool:
    """Whether two nested arguments are equal, tensors by value."""
    left, right = tree_leaves(first), tree_leaves(second)
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else _same(a, b)
        for a, b in zip(left, right, strict=True)
    )


def _same(first: Any, second: Any) -> bool:
    """Numbers and words by value; of other objects, such as caches, the type alone can be told."""
    comparable = isinstance(first, bool | int | float | str)
    return type(first) is type(second) and (not comparable or first == second)


class _BlockOutput(Tensor):
    """Hidden states as a block's output: they are it, or the first of what a family takes apart."""

    # As a parameter's: what is computed from it is a plain tensor.
    __torch_function__ = nn.Parameter.__torch_function__

    def __getitem__(self, index: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]


class _Recorder:
    """Stands in for a block's forward: keeps its arguments and passes the hidden states on."""

    def __init__(self) -> None:
        self.call: BlockCall | None = None
        self.hidden: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        self.hidden, self.call = hidden.as_subclass(Tensor), BlockCall(args, kwargs)
        return self.hidden.as_subclass(_BlockOutput)


@torch.no_grad()
def capture_calls(
    model: PreTrainedModel, blocks: DecoderBlocks, input_ids: Tensor
) -> tuple[Tensor, list[BlockCall]]:
    """Run the model's own forward around its blocks, which may still be empty.

    So masks and position arguments are the model's, whatever its family gives to each block.

    Args:
        model: embeddings loaded, blocks not needed.
        blocks: the model's blocks.
        input_ids: tokens `[batch, tokens]`.

    Returns:
        The hidden states that enter the first block, and each block's arguments.
    """
    recorders = [_Recorder() for _ in blocks.modules]
    try:
        for block, recorder in zip(blocks.modules, recorders, strict=True):
            block.forward = recorder
        model.base_model(input_ids=input_ids, use_cache=False)
    finally:
        for block in blocks.modules:
            del block.forward
    calls = [recorder.call for recorder in recorders if recorder.call is not None]
    entering = recorders[0].hidden
    if entering is None or len(calls) != len(blocks):
        raise ConfigError(
            f"{type(model).__name__} does not run each of its {len(blocks)} blocks once",
            "dbllm reconstructs models whose forward calls every block in order; use distill",
        )
    return entering, calls


def logits_after(model: PreTrainedModel, blocks: DecoderBlocks, hidden: Tensor) -> Tensor:
    """Run what the model's own forward does after its blocks, which may be empty.

    Args:
        model: all outside the blocks loaded.
        blocks: the model's blocks.
        hidden: the last block's output `[batch, tokens, hidden]`.

    Returns:
        Logits `[batch, tokens, vocabulary]`, with gradients to `hidden`.
    """
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    try:
        for block in blocks.modules:
            block.forward = lambda *_, **__: hidden.as_subclass(_BlockOutput)
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        for block in blocks.modules:
            del block.forward
    return logits

"""Mean square of each input channel of the linear layers, tokens weighted as in reconstruct."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dbllm_cli.llm.blocks import DecoderBlocks, find_blocks
from dbllm_cli.llm.models import Model
from dbllm_cli.progress import Task


def token_weights(output: Tensor) -> Tensor:
    """1 / mean square of a block's output for each token, `[...]` from `[..., hidden]`, float32.

    So the first token, whose hidden state is huge in LLaMA-like models, does not stand for all.
    """
    return output.to(torch.float32).square().mean(-1).clamp(min=1e-12).reciprocal()


class InputStatistics:
    """Sums, over tokens, of the squares of each layer's inputs, by `token_weights`."""

    def __init__(self, blocks: DecoderBlocks) -> None:
        self._blocks = blocks
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._inputs: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, every forward of the model counts."""
        handles = []
        for name, module in self._blocks.linear_layers():
            handles.append(module.register_forward_pre_hook(self._keeper(name)))
        for index, block in enumerate(self._blocks.modules):
            handles.append(block.register_forward_hook(self._adder(self._blocks.name(index))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            self._inputs[name] = args[0]

        return keep

    def _adder(self, block_name: str) -> Any:
        def add(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            hidden = output[0] if isinstance(output, tuple) else output
            weights = token_weights(hidden).flatten()
            # Layers that share an input share its squares.
            sums: dict[int, Tensor] = {}
            inputs = {n: x for n, x in self._inputs.items() if n.startswith(f"{block_name}.")}
            for name, x in inputs.items():
                del self._inputs[name]
                if x.shape[:-1].numel() != weights.numel():
                    continue
                if id(x) not in sums:
                    sums[id(x)] = weights @ x.to(torch.float32).square().flatten(0, -2)
                self._add(name, sums[id(x)], float(weights.sum()))

        return add

    def _add(self, name: str, squares: Tensor, weight: float) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros_like(squares)) + squares
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self) -> Mapping[str, Tensor]:
        """Layer name -> weighted mean square of each input, float32 `[in]`."""
        return {name: (total / self._weights[name]).cpu() for name, total in self._sums.items()}


@torch.inference_mode()
def input_mean_squares(
    model: Model, sequences: Tensor, batch_size: int, task: Task
) -> Mapping[str, Tensor]:
    """Run the model over sequences `[n, tokens]` and collect the statistics of its layers.

    Args:
        model: the teacher.
        sequences: int64 token ids.
        batch_size: sequences at once.
        task: advanced by sequences.

    Returns:
        Layer name -> float32 `[in]`.
    """
    statistics = InputStatistics(find_blocks(model))
    with statistics.watching():
        for batch in sequences.split(batch_size):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
            task.advance(batch.shape[0])
    return statistics.means()

"""What the blocks of a model give, and how far two models' are apart."""

from pathlib import Path
from typing import Any

import torch

from dbllm_cli.llm.models import load_model
from dbllm_cli.store import Artifact


def block_outputs(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The output of every block, that of the last one before the final norm."""
    seen: list[Any] = []
    hooks = [
        block.register_forward_hook(lambda *call: seen.append(call[-1]))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return [output[0] if isinstance(output, tuple) else output for output in seen]


def hidden_after(model: Any, ids: torch.Tensor, block: int) -> torch.Tensor:
    return block_outputs(model, ids)[block]


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean over tokens of the square error of hidden states, relative to their squares."""
    return float(((found - exact).square().sum(-1) / exact.square().sum(-1)).mean())


def block_errors(fdb: Artifact, folder: Path, ids: torch.Tensor) -> list[float]:
    """Mean over tokens of the relative square error of each block's output, in the whole model."""
    exact, found = (
        block_outputs(load_model(path, torch.float32), ids) for path in (folder, fdb.path)
    )
    return [relative_error(ours, theirs) for theirs, ours in zip(exact, found, strict=True)]

"""What the blocks of a model give, and how far two models' are apart."""

from pathlib import Path
from typing import Any

import torch

from dbllm_cli.llm.models import load_model
from dbllm_cli.store import Artifact


def hidden_after(model: Any, ids: torch.Tensor, block: int) -> torch.Tensor:
    seen: list[Any] = []
    model.model.layers[block].register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        model(ids)
    hidden: torch.Tensor = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return hidden


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean over tokens of the square error of hidden states, relative to their squares."""
    return float(((found - exact).square().sum(-1) / exact.square().sum(-1)).mean())


def block_errors(fdb: Artifact, folder: Path, ids: torch.Tensor) -> list[float]:
    """Mean over tokens of the relative square error of each block's output, in the whole model.

    The output of the last block is read before the final norm.
    """
    outputs: list[list[torch.Tensor]] = []
    for path in (folder, fdb.path):
        model, seen = load_model(path, torch.float32), []
        for block in model.model.layers:
            block.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model(ids)
        outputs.append([o[0] if isinstance(o, tuple) else o for o in seen])
    return [relative_error(ours, theirs) for theirs, ours in zip(*outputs, strict=True)]

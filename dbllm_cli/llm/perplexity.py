"""The loss of every window of a text, and perplexity from them."""

import math
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbllm_cli.llm.heads import CHUNK_TOKENS, Head, final_hidden, head
from dbllm_cli.progress import Task


@dataclass(frozen=True)
class Window:
    """Tokens to run and how many of the last ones to score.

    Attributes:
        ids: int64 `[tokens]`.
        scored: predictions that count, the last ones of the window; at most tokens − 1.
    """

    ids: Tensor
    scored: int


def full_windows(sequences: Tensor) -> list[Window]:
    """One window per row of `[n, tokens]`, every prediction scored."""
    return [Window(row, row.shape[0] - 1) for row in sequences]


def strided_windows(stream: list[int], sequence_length: int, stride: int) -> list[Window]:
    """Overlapping windows that start every `stride` tokens; each token is scored once.

    Args:
        stream: token ids.
        sequence_length: tokens of a window; the last may be shorter.
        stride: tokens between starts, less than sequence_length.

    Raises:
        ValueError: the windows would not overlap.
    """
    if stride >= sequence_length:
        raise ValueError("windows that do not overlap leave tokens unscored")
    ids = torch.tensor(stream, dtype=torch.int64)
    result, scored_up_to = [], 1
    for start in range(0, len(stream), stride):
        end = min(start + sequence_length, len(stream))
        if end > scored_up_to:
            result.append(Window(ids[start:end], end - scored_up_to))
            scored_up_to = end
        if end == len(stream):
            break
    return result


@torch.inference_mode()
def window_losses(
    model: PreTrainedModel, windows: list[Window], batch_size: int, task: Task
) -> list[float]:
    """Sum of −ln p over the scored tokens of each window, in nats.

    Args:
        model: dense or packed.
        windows: windows of equal length run in batches; others alone.
        batch_size: windows at once.
        task: advanced by windows.
    """
    to_logits = head(model)
    losses: list[float] = []
    start = 0
    while start < len(windows):
        batch = _equally_long(windows[start : start + batch_size])
        ids = torch.stack([window.ids for window in batch]).to(model.device)
        hidden = final_hidden(model, ids)
        for row, window in enumerate(batch):
            losses.append(_scored_loss(to_logits, hidden[row], ids[row], window.scored))
        start += len(batch)
        task.advance(len(batch), perplexity=_running(losses, windows))
    return losses


def _equally_long(windows: list[Window]) -> list[Window]:
    length = len(windows[0].ids)
    return list(takewhile(lambda window: len(window.ids) == length, windows))


def _scored_loss(to_logits: Head, hidden: Tensor, ids: Tensor, scored: int) -> float:
    total = 0.0
    first = ids.shape[0] - 1 - scored
    for start in range(first, ids.shape[0] - 1, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, ids.shape[0] - 1)
        logits = to_logits(hidden[start:stop]).to(torch.float32)
        losses = torch.nn.functional.cross_entropy(
            logits, ids[start + 1 : stop + 1], reduction="none"
        )
        total += float(losses.to(torch.float64).sum())
    return total


def perplexity_of(losses: list[float], tokens: list[int]) -> float:
    """Exp of the token-weighted mean loss; infinite where that overflows."""
    mean = math.fsum(losses) / sum(tokens)
    return math.exp(mean) if mean < 700 else math.inf


def _running(losses: list[float], windows: list[Window]) -> float:
    return perplexity_of(losses, [window.scored for window in windows[: len(losses)]])

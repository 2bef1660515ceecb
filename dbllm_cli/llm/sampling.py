"""Sequences that the teacher writes itself (LLM-QAT, arXiv 2305.17888, section 3.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dbllm_cli.progress import Task


@dataclass(frozen=True)
class SamplingSettings:
    """How sequences are drawn.

    Attributes:
        sequence_length: tokens of each sequence, the prefix included.
        greedy_tokens: tokens taken greedily after the start token.
        temperature: of the sampled rest.
        top_k: sample among so many likeliest tokens; 0 means all.
        start_tokens: start tokens are drawn below this id.
    """

    sequence_length: int
    greedy_tokens: int
    temperature: float
    top_k: int
    start_tokens: int


@torch.inference_mode()
def sample_sequences(
    model: PreTrainedModel,
    prefix: list[int],
    count: int,
    settings: SamplingSettings,
    seed: int,
    task: Task,
) -> Tensor:
    """Draw a batch of sequences: prefix, a random start token, greedy tokens, sampled tokens.

    Draws from its own generator: the global seed is untouched. Text goes on after an end token, as
    packed documents do.

    Args:
        model: the teacher.
        prefix: what the tokenizer begins a text with; may be empty.
        count: sequences.
        settings: how to draw.
        seed: of this batch.
        task: advanced by `count` tokens a step.

    Returns:
        int64 `[count, sequence_length]`.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    start = torch.randint(
        settings.start_tokens,
        (count, 1),
        generator=generator,
        device=model.device,
        dtype=torch.int64,
    )
    begin = torch.tensor(prefix, dtype=torch.int64, device=model.device).expand(count, -1)
    sequence = torch.cat((begin, start), dim=1)[:, : settings.sequence_length]
    cache = DynamicCache(config=model.config)
    entering = sequence
    task.advance(sequence.numel())
    for position in range(settings.sequence_length - sequence.shape[1]):
        output = model(input_ids=entering, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].to(torch.float32)
        if position < settings.greedy_tokens:
            entering = logits.argmax(-1, keepdim=True)
        else:
            entering = _draw(logits / settings.temperature, settings.top_k, generator)
        sequence = torch.cat((sequence, entering), dim=1)
        task.advance(count)
    return sequence


def _draw(logits: Tensor, top_k: int, generator: torch.Generator) -> Tensor:
    if not top_k:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)
    values, ids = logits.topk(min(top_k, logits.shape[-1]))
    chosen = torch.multinomial(values.softmax(-1), 1, generator=generator)
    return ids.gather(-1, chosen)

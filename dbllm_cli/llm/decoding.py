"""A timed prefill and decode with a cache, as serving does it."""

import time

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dbllm_cli.llm.models import vocabulary_size


@torch.inference_mode()
def prefill_and_decode(
    model: PreTrainedModel, batch_size: int, prompt_tokens: int, decode_tokens: int, seed: int
) -> tuple[float, float]:
    """Run a random prompt and decode greedily after it.

    Args:
        model: dense or packed.
        batch_size: sequences at once.
        prompt_tokens: tokens of each prompt.
        decode_tokens: tokens decoded one by one.
        seed: of the prompt.

    Returns:
        Seconds of the prefill and of the whole decode.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocabulary_size(model), (batch_size, prompt_tokens), generator=generator)
    cache = DynamicCache(config=model.config)
    entering = prompt.to(model.device)
    begin = _now(model.device)
    token = _next_token(model, entering, cache)
    middle = _now(model.device)
    for _ in range(decode_tokens):
        token = _next_token(model, token, cache)
    return middle - begin, _now(model.device) - middle


def _next_token(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
    return token


def _now(device: torch.device) -> float:
    module = torch.get_device_module(device)
    module.synchronize(*(() if device.type == "mps" else (device,)))
    return time.perf_counter()

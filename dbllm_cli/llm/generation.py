"""Text from a teacher, fdb or packed model, piece by piece as it is written."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, cast

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.models import load_model, model_folder, require_positions
from dbllm_cli.llm.tokenizers import load_tokenizer
from dbllm_cli.store import Artifact
from dbllm_cli.tensors import torch_dtype


def generate_stream(
    artifact: Artifact,
    prompt: str,
    *,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: str,
    dtype: str,
    work: Path,
    trust_remote_code: bool,
) -> Iterator[str]:
    """Continue a prompt, or answer it.

    Args:
        artifact: kind model, fdb or packed.
        prompt: the text.
        chat: wrap the prompt in the model's chat template.
        max_new_tokens: most tokens written.
        temperature: 0 takes the likeliest token.
        top_k: sample among so many likeliest tokens; 0 means all.
        seed: of the sampling.
        device: torch device.
        dtype: of the products.
        work: the store's work area.
        trust_remote_code: let transformers run code that comes with the model.

    Yields:
        Pieces of text.

    Raises:
        ConfigError: no chat template, nothing to begin with, or more tokens than positions.
    """
    folder = model_folder(artifact, work, trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    ids = _prompt_ids(tokenizer, prompt, chat)
    require_positions(folder, ids.shape[-1] + max_new_tokens, trust_remote_code)
    model = load_model(folder, torch_dtype(dtype), device, trust_remote_code)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = Event()
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "stopping_criteria": StoppingCriteriaList([_StopWhenSet(stopped)]),
    }
    if temperature > 0:
        # Without top_p the model's own would go on beside top_k.
        options |= {"temperature": temperature, "top_k": top_k, "top_p": 1.0}
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(_generate, model, ids, streamer, seed, options)
        # A failure must end the stream too, or its reader would wait for ever.
        writing.add_done_callback(lambda _: streamer.end())
        try:
            yield from streamer
        finally:
            stopped.set()
        writing.result()


class _StopWhenSet(StoppingCriteria):
    """Ends the writing when its reader has gone, by Ctrl-C for one."""

    def __init__(self, stopped: Event) -> None:
        self._stopped = stopped

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        del scores, kwargs
        return torch.full((input_ids.shape[0],), self._stopped.is_set(), device=input_ids.device)


def _generate(
    model: PreTrainedModel,
    ids: torch.Tensor,
    streamer: TextIteratorStreamer,
    seed: int,
    options: dict[str, Any],
) -> None:
    own_state = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(own_state):
        torch.manual_seed(seed)
        ids = ids.to(model.device)
        cast(Any, model).generate(
            ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options
        )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    if chat:
        if tokenizer.chat_template is None:
            raise ConfigError("this model has no chat template", "leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        prompt = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    ids: torch.Tensor = tokenizer(
        prompt, return_tensors="pt", add_special_tokens=not chat
    ).input_ids
    if ids.shape[-1] == 0:
        raise ConfigError("the prompt is empty and the model has no start token", "give a prompt")
    return ids.long()

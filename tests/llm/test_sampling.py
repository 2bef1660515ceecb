from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dbllm_cli.llm.sampling import SamplingSettings, sample_sequences
from dbllm_cli.progress import SilentProgress
from tests.llm.conftest import VOCABULARY

SETTINGS = SamplingSettings(
    sequence_length=14, greedy_tokens=3, temperature=1.0, top_k=5, start_tokens=VOCABULARY
)


def _sample(
    model: PreTrainedModel,
    settings: SamplingSettings = SETTINGS,
    seed: int = 0,
    prefix: tuple[int, ...] = (1,),
    count: int = 6,
) -> Tensor:
    with SilentProgress().task("sample", 1) as task:
        return sample_sequences(model, list(prefix), count, settings, seed, task)


def _logits(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """Of the whole sequences at once, without a cache."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=sequences, use_cache=False).logits
    return logits


def test_the_same_seed_gives_the_same_sequences_and_another_seed_others(
    llama: PreTrainedModel,
) -> None:
    first = _sample(llama)
    torch.rand(17)
    assert torch.equal(first, _sample(llama))
    assert not torch.equal(first, _sample(llama, seed=1))


def test_the_global_seed_is_untouched(llama: PreTrainedModel) -> None:
    before = torch.random.get_rng_state()
    _sample(llama)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("prefix", [(), (1,), (1, 3)])
def test_sequences_are_prefix_start_token_greedy_tokens_and_likely_tokens(
    llama: PreTrainedModel, prefix: tuple[int, ...]
) -> None:
    sequences = _sample(llama, prefix=prefix)
    assert sequences.shape == (6, 14)
    assert sequences.dtype == torch.int64
    begin = len(prefix) + 1
    assert sequences[:, : len(prefix)].tolist() == [list(prefix)] * 6
    assert len(set(sequences[:, len(prefix)].tolist())) > 1
    logits = _logits(llama, sequences)
    following = sequences[:, begin:]
    before = logits[:, begin - 1 : -1]
    rank = (before > before.gather(-1, following[..., None])).sum(-1)
    assert not rank[:, :3].any()
    assert rank[:, 3:].max() < 5
    assert rank[:, 3:].any()


def test_sampling_is_at_the_temperature_from_the_model_s_distribution(
    llama: PreTrainedModel,
) -> None:
    settings = SamplingSettings(
        sequence_length=3, greedy_tokens=0, temperature=2.0, top_k=0, start_tokens=VOCABULARY
    )
    sequences = _sample(llama, settings, count=6000)
    start = int(sequences[:, 1].mode().values)
    drawn = sequences[sequences[:, 1] == start, 2]
    p = (_logits(llama, torch.tensor([[1, start]]))[0, -1] / 2.0).softmax(-1)
    share = drawn.bincount(minlength=VOCABULARY) / drawn.numel()
    top = int(p.argmax())
    deviation = float((p[top] * (1 - p[top]) / drawn.numel()).sqrt())
    assert abs(float(share[top] - p[top])) < 4 * deviation + 1e-3


def test_a_prefix_as_long_as_the_sequence_is_cut_to_it(llama: PreTrainedModel) -> None:
    settings = replace(SETTINGS, sequence_length=2)
    assert _sample(llama, settings, prefix=(1, 2, 3)).tolist() == [[1, 2]] * 6


def test_start_tokens_are_never_rows_that_the_tokenizer_does_not_know(
    llama: PreTrainedModel,
) -> None:
    settings = SamplingSettings(
        sequence_length=2, greedy_tokens=0, temperature=1.0, top_k=0, start_tokens=5
    )
    assert _sample(llama, settings, count=200)[:, 1].max() == 4

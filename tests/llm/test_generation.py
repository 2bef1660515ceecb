"""Text that a model writes, as it comes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.generation import generate_stream
from dbllm_cli.store import Artifact
from tests.tiny_models import POSITIONS, save_model

PROMPT = "Once upon"


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its positions are learned: there is none beyond the last."""
    return save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


def write(folder: Path, **options: Any) -> str:
    defaults: dict[str, Any] = {
        "chat": False,
        "max_new_tokens": 8,
        "temperature": 0.0,
        "top_k": 0,
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "work": folder / "work",
        "trust_remote_code": False,
    }
    artifact = Artifact(folder, "model", "digest", {})
    return "".join(generate_stream(artifact, PROMPT, **defaults | options))


def test_at_temperature_zero_the_likeliest_tokens_are_written(gpt2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    prompt: list[int] = tokenizer(PROMPT).input_ids
    ids = list(prompt)
    while len(ids) < len(prompt) + 8 and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert write(gpt2_folder) == expected


def test_the_seed_alone_draws_what_is_written(gpt2_folder: Path) -> None:
    first, again, other = (
        write(gpt2_folder, temperature=1.0, max_new_tokens=20, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_seed_of_whoever_calls_is_left_as_it_was(gpt2_folder: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    write(gpt2_folder, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_tokens_than_positions_are_refused(gpt2_folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"more than the {POSITIONS} positions"):
        write(gpt2_folder, max_new_tokens=POSITIONS)

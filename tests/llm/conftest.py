"""Tiny random models, and the shared real data where it is there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dbllm_cli.progress import SilentProgress, Task

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
VOCABULARY = 64


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random weights that are large enough for its predictions to differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
    return model.eval().requires_grad_(False)


def llama_config(**changes: Any) -> LlamaConfig:
    """Grouped-query attention, and an ffn that is no multiple of a group."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**sizes | changes)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return random_model(llama_config())


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def task() -> Iterator[Task]:
    with SilentProgress().task("test", 1) as silent:
        yield silent


def shared_data(*parts: str) -> Path:
    """A path of the shared data; the test is skipped where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    return shared_data("models", "stories260K-hf")


@pytest.fixture(scope="session")
def stories_tokenizer(stories_folder: Path) -> PreTrainedTokenizerBase:
    from dbllm_cli.llm.tokenizers import load_tokenizer

    return load_tokenizer(stories_folder)

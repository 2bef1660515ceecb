from pathlib import Path

import pytest
import torch
from torch import Tensor

from dbllm_cli.errors import ConfigError
from dbllm_cli.kernels import dequantize_rows, int8_linear, quantize_rows
from dbllm_cli.llm.embeddings import (
    Int8Embedding,
    Int8Head,
    embedding_names,
    use_int8_embeddings,
)
from tests.llm.conftest import llama_config, random_model
from tests.tiny_models import save_model


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_output_layer_compute_with_the_rounded_rows(tied: bool, ids: Tensor) -> None:
    model = random_model(llama_config(tie_word_embeddings=tied))
    twin = random_model(llama_config(tie_word_embeddings=tied))
    twin.load_state_dict(model.state_dict())
    tables = {name: quantize_rows(model.get_parameter(name)) for name in embedding_names(model)}
    with torch.no_grad():
        for name, table in tables.items():
            twin.get_parameter(name).copy_(dequantize_rows(table, torch.float32))
    use_int8_embeddings(model)
    for name, table in tables.items():
        model.get_parameter(name).data = table
    with torch.no_grad():
        logits, expected = model(input_ids=ids).logits, twin(input_ids=ids).logits
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_embeddings_follow_the_dtype_of_the_model() -> None:
    model = random_model(llama_config())
    use_int8_embeddings(model)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, Int8Embedding)
    assert isinstance(model.get_output_embeddings(), Int8Head)
    embedding.weight.data = quantize_rows(torch.ones(embedding.num_embeddings, 32))
    model.to(torch.bfloat16)
    assert embedding.weight.dtype == torch.uint8
    assert embedding(torch.tensor([0])).dtype == torch.bfloat16


def test_an_embedding_that_does_more_than_look_up_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "gemma", "gemma"))
    with pytest.raises(ConfigError, match="embeddings of GemmaForCausalLM"):
        embedding_names(model)


def test_integers_in_the_place_of_hidden_states_are_refused() -> None:
    """As a family gives them that casts to the dtype of the output layer's weight."""
    rows = quantize_rows(torch.ones(5, 8))
    with pytest.raises(ValueError, match="without --embeddings int8"):
        int8_linear(torch.ones(2, 8, dtype=torch.uint8), rows)

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.heads import final_hidden, head
from tests.llm.conftest import VOCABULARY, llama_config, random_model


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("tied", [False, True])
def test_head_after_final_hidden_states_gives_the_model_s_own_logits(
    tied: bool, ids: Tensor
) -> None:
    model = random_model(llama_config(tie_word_embeddings=tied))
    assert torch.equal(head(model)(final_hidden(model, ids)), _logits(model, ids))


def test_gemma_s_soft_cap_is_applied(ids: Tensor) -> None:
    model = random_model(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=2.0,
        )
    )
    assert torch.allclose(head(model)(final_hidden(model, ids)), _logits(model, ids), atol=1e-5)
    assert float(_logits(model, ids).abs().max()) > 1


_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    "config",
    [CohereConfig(**_SMALL, logit_scale=0.25), GraniteConfig(**_SMALL, logits_scaling=4.0)],
    ids=["cohere", "granite"],
)
def test_logits_that_a_family_scales_are_scaled(config: PreTrainedConfig, ids: Tensor) -> None:
    model = random_model(config)
    found = head(model)(final_hidden(model, ids))
    assert torch.allclose(found, _logits(model, ids), rtol=1e-4, atol=1e-6)


def test_a_model_that_changes_its_logits_otherwise_is_refused() -> None:
    model = random_model(llama_config())
    model.register_forward_hook(_triple_logits)
    with pytest.raises(ConfigError, match="LlamaForCausalLM changes its logits"):
        head(model)


def _triple_logits(module: object, args: object, output: dict[str, Tensor]) -> object:
    output["logits"] = output["logits"] * 3
    return output

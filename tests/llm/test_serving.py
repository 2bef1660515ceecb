"""What a packed model gets beside its products on the CPU: attention and norms of its own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dbllm_cli.kernels import cpu_kernels
from dbllm_cli.llm.attention import NAME, use_cpu_attention
from dbllm_cli.llm.norms import RmsNorm, use_cpu_norms
from tests.tiny_models import save_model

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not compiled")


def _model(folder: Path, architecture: str, **options: str) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(folder / architecture, **options)
    model: PreTrainedModel = loaded.eval()
    return model


def _norms(model: PreTrainedModel) -> int:
    return sum(isinstance(module, RmsNorm) for module in model.modules())


def _generate(model: PreTrainedModel, **options: object) -> Tensor:
    prompts = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(prompts)
    seen[1, :4] = 0  # a shorter prompt, padded on the left
    written: Tensor = model.generate(  # type: ignore[operator]
        prompts,
        attention_mask=seen,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **options,
    )
    return torch.stack(written.logits)  # type: ignore[attr-defined]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_logits_of_transformers_own_operators(
    architecture: str, cache: str, tmp_path: Path
) -> None:
    save_model(tmp_path / architecture, architecture)
    expected = _generate(_model(tmp_path, architecture), cache_implementation=cache)
    model = _model(tmp_path, architecture)
    use_cpu_attention(model)
    use_cpu_norms(model)
    assert model.config._attn_implementation == NAME
    logits = _generate(model, cache_implementation=cache, disable_compile=True)
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_norms_that_compute_something_else_stay(tmp_path: Path) -> None:
    save_model(tmp_path / "gemma", "gemma")
    save_model(tmp_path / "qwen3", "qwen3")
    gemma, qwen = _model(tmp_path, "gemma"), _model(tmp_path, "qwen3")
    use_cpu_norms(gemma)
    use_cpu_norms(qwen)
    assert _norms(gemma) == 0
    # Two a block, one for queries and one for keys, and the last.
    assert _norms(qwen) == 4 * qwen.config.num_hidden_layers + 1


def test_an_attention_that_the_user_chose_stays(tmp_path: Path) -> None:
    save_model(tmp_path / "llama", "llama")
    model = _model(tmp_path, "llama", attn_implementation="eager")
    use_cpu_attention(model)
    assert model.config._attn_implementation == "eager"


def test_the_choice_of_attention_is_not_saved_with_the_model(tmp_path: Path) -> None:
    save_model(tmp_path / "llama", "llama")
    model = _model(tmp_path, "llama")
    use_cpu_attention(model)
    use_cpu_norms(model)
    names = set(model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    assert NAME not in (tmp_path / "saved" / "config.json").read_text()
    assert set(_model(tmp_path, "saved").state_dict()) == names

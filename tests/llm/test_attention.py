"""Which attention a packed model decodes with."""

from pathlib import Path

import pytest

from dbllm_cli.kernels import cpu_kernels
from dbllm_cli.llm.attention import NAME, use_cpu_attention
from dbllm_cli.llm.blocks import find_blocks
from dbllm_cli.llm.decoder_blocks import use_block_kernels
from tests.llm.packed_models import packed_model, served_model

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the CPU kernels are not compiled")


def test_an_attention_that_the_user_chose_stays() -> None:
    model = packed_model("llama")
    model.set_attn_implementation("eager")
    use_cpu_attention(model)
    use_block_kernels(model)
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in vars(layer) for layer in find_blocks(model).modules)


def test_the_choice_of_attention_is_not_saved_with_the_model(tmp_path: Path) -> None:
    served_model("llama").config.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()

"""Families of models, found by structure: each goes the whole way and loads as it was stored."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    JambaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

import dbllm_cli.hf  # noqa: F401
from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.models import load_model
from dbllm_cli.store import Artifact
from tests.conftest import Workshop
from tests.tiny_models import FAMILIES, build_model, dequantized, save_model, save_tokenizer

# Longer than the sliding windows of the families that have one.
IDS = torch.arange(3, 43).view(2, 20)
BLOCK_LAYERS = {"opt": 6, "gpt-neox": 4, "gpt2": 4, "phi": 6, "bloom": 4, "gptj": 6}


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def built_by_hand(source: Path, packed: Path) -> PreTrainedModel:
    """The family's own dense model, its weights put in from the packed tensors."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = load_file(packed / "model.safetensors")
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.alpha" not in tensors:
                parameter.copy_(tensors[name])
                continue
            transposed = isinstance(modules[layer], Conv1D)
            in_features = parameter.shape[0 if transposed else 1]
            dense = dequantized(tensors, layer, in_features)
            parameter.copy_(dense.t() if transposed else dense)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_from_start_to_packed(
    workshop: Workshop, tmp_path: Path, family: str
) -> None:
    model = workshop.model(save_model(tmp_path / family, family))
    calibration = workshop.calibrate(model, num_samples=5, sequence_length=20)
    start = workshop.make("init-fdb", {"model": model, "calibration": calibration})
    inputs = {"student": start, "model": model, "calibration": calibration}
    # The last batch is a short one.
    reconstructed = workshop.run("reconstruct", inputs, batch_size=2, passes=8, warmup_steps=1)
    for block in reconstructed.metrics["blocks"]:
        assert block["error_after"] < block["error_before"]
    assert reconstructed.metrics["layers"] == 2 * BLOCK_LAYERS.get(family, 7)
    packed = workshop.make("pack", {"fdb": reconstructed.artifact})

    loaded = logits_of(AutoModelForCausalLM.from_pretrained(packed.path, dtype=torch.float32))
    of_fdb = logits_of(load_model(reconstructed.artifact.path, torch.float32))
    by_hand = logits_of(built_by_hand(model.path, packed.path))
    size = by_hand.abs().max()
    assert (loaded - of_fdb).abs().max() <= 1e-5 * size
    assert (loaded - by_hand).abs().max() <= 1e-5 * size
    teacher = logits_of(AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32))
    assert (loaded - teacher).abs().max() > 1e-3 * size


@pytest.mark.parametrize("family", ["gemma2", "opt", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("train", ["scales", "weights"])
def test_a_family_is_distilled(workshop: Workshop, tmp_path: Path, family: str, train: str) -> None:
    model = workshop.model(save_model(tmp_path / family, family))
    calibration = workshop.calibrate(model, num_samples=5, sequence_length=20)
    start = workshop.make("init-fdb", {"model": model, "calibration": calibration})
    inputs = {"student": start, "model": model, "calibration": calibration}
    metrics = workshop.run(
        "distill", inputs, train=train, steps=8, batch_size=2, warmup_steps=1, scale_lr=1e-2,
        eval_every=4,
    ).metrics  # fmt: skip
    assert metrics["held_out_loss"] < metrics["held_out_loss_start"]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3"])
def test_reconstruct_runs_each_block_with_its_own_mask(
    workshop: Workshop, tmp_path: Path, family: str
) -> None:
    """Without a layer left to quantize in it, a block's error is that of wrong arguments alone."""
    model = workshop.model(save_model(tmp_path / family, family))
    calibration = workshop.calibrate(model, num_samples=4, sequence_length=20)
    start = workshop.make("init-fdb", {"model": model}, include=("*.1.mlp.*",), dtype="float32")
    inputs = {"student": start, "model": model, "calibration": calibration}
    outcome = workshop.run("reconstruct", inputs, batch_size=4, passes=1)
    ids = load_file(calibration.path / "tokens.safetensors")["train"].long()
    outputs = []
    for folder in (model.path, outcome.artifact.path):
        loaded, seen = load_model(folder, torch.float32), []
        loaded.base_model.layers[1].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output)
        )
        with torch.no_grad():
            loaded(ids)
        outputs.append(seen[0][0] if isinstance(seen[0], tuple) else seen[0])
    theirs, ours = outputs
    error = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()
    blocks = outcome.metrics["blocks"]
    assert blocks[0]["error_after"] == 0
    assert blocks[1]["error_after"] == pytest.approx(float(error), rel=1e-2, abs=2e-6)


def test_experts_fused_into_matrices_are_refused_too(workshop: Workshop, tmp_path: Path) -> None:
    config = DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=288,
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
    )  # fmt: skip
    build_model(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"ffn\.experts\.mlp .*24,576 weights"):
        workshop.make("init-fdb", {"model": workshop.model(tmp_path)}, method="mse", levels="plain")


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (MambaConfig(vocab_size=288, hidden_size=64, num_hidden_layers=2, state_size=2), 2),
        (
            JambaConfig(
                vocab_size=288, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, num_experts=1, mamba_d_state=2,
                attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False,
            ),
            1,
        ),
    ],
    ids=["mamba", "jamba"],
)  # fmt: skip
def test_a_layer_whose_weight_is_read_and_that_is_never_called_is_refused(
    workshop: Workshop, tmp_path: Path, config: PreTrainedConfig, layers: int
) -> None:
    build_model(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model = workshop.model(tmp_path)
    with pytest.raises(ConfigError, match=rf"does not call .*dt_proj \({layers} such") as caught:
        workshop.make("init-fdb", {"model": model}, method="mse", levels="plain")
    assert "--exclude '*dt_proj'" in caught.value.hint
    settings = {"method": "mse", "levels": "plain", "exclude": ("*dt_proj",)}
    start = workshop.make("init-fdb", {"model": model}, **settings)
    packed = workshop.make("pack", {"fdb": start})
    assert logits_of(load_model(packed.path, torch.float32)).isfinite().all()


MIXTURES = {
    "mixtral": MixtralConfig(
        vocab_size=288, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        num_local_experts=2, num_experts_per_tok=1,
    ),
    "qwen3-moe": Qwen3MoeConfig(
        vocab_size=288, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=64, num_experts=2, num_experts_per_tok=1,
    ),
}  # fmt: skip


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path: Path, workshop: Workshop) -> Artifact:
    folder = tmp_path / request.param
    build_model(MIXTURES[request.param]).save_pretrained(folder)
    save_tokenizer(folder)
    return workshop.model(folder)


def test_fused_experts_are_refused_by_name(workshop: Workshop, mixture: Artifact) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.mlp\.experts .*fused into one tensor"
    ) as caught:
        workshop.make("init-fdb", {"model": mixture})
    assert "--exclude" in caught.value.hint


def test_fused_experts_stay_in_full_precision_when_told_to(
    workshop: Workshop, mixture: Artifact
) -> None:
    fdb = workshop.make(
        "init-fdb", {"model": mixture}, method="mse", levels="plain", exclude=("*experts*",)
    )
    packed = workshop.make("pack", {"fdb": fdb})
    loaded = logits_of(AutoModelForCausalLM.from_pretrained(packed.path, dtype=torch.float32))
    by_hand = AutoModelForCausalLM.from_pretrained(mixture.path, dtype=torch.float32)
    tensors = load_file(packed.path / "model.safetensors")
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            layer = name.removesuffix(".weight")
            packed_layer = f"{layer}.alpha" in tensors
            parameter.copy_(
                dequantized(tensors, layer, parameter.shape[1])
                if packed_layer
                else parameter.bfloat16()
            )
    torch.testing.assert_close(loaded, logits_of(by_hand), rtol=1e-4, atol=1e-5)

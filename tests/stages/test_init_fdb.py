import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbllm_cli.configs import InitFdbConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.store import Artifact
from tests.conftest import Workshop
from tests.stages.conftest import Notes
from tests.tiny_models import dequantized, planes_of

LAYERS = {
    f"model.layers.{block}.{part}"
    for block in (0, 1)
    for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip


def quantized(artifact: Artifact) -> set[str]:
    tensors = load_file(artifact.path / "model.safetensors")
    return {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}


def squared_error(fdb: Artifact, folder: Path, importance: dict[str, torch.Tensor]) -> float:
    tensors = load_file(fdb.path / "model.safetensors")
    originals = load_file(folder / "model.safetensors")
    error = size = 0.0
    for name in quantized(fdb):
        original = originals[f"{name}.weight"]
        dense = dequantized(tensors, name, original.shape[1])
        weights = importance.get(name, torch.ones(original.shape[1]))
        error += float(((dense - original).square() * weights).sum())
        size += float((original.square() * weights).sum())
    return error / size


def test_every_linear_layer_of_the_blocks_is_quantized_and_nothing_else(
    start: Artifact, llama_folder: Path
) -> None:
    tensors = load_file(start.path / "model.safetensors")
    assert quantized(start) == LAYERS
    down = "model.layers.1.mlp.down_proj"
    assert (tensors[f"{down}.weight"].dtype, tensors[f"{down}.weight"].shape) == (
        torch.uint8,
        (2, 64, 13),
    )
    assert (tensors[f"{down}.alpha"].dtype, tensors[f"{down}.alpha"].shape) == (
        torch.uint16,
        (1, 64, 2),
    )
    assert tensors[f"{down}.row_exponent"].shape == (64,)
    for name, original in load_file(llama_folder / "model.safetensors").items():
        if name.removesuffix(".weight") not in LAYERS:
            assert torch.equal(tensors[name], original.bfloat16())


def test_what_float16_can_not_hold_is_told(
    fresh: Workshop, llama_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is too large for float16") as told:
        fresh.make("init-fdb", {"model": fresh.model(folder)}, dtype="float16")
    assert "--dtype bfloat16" in told.value.hint


def test_the_scales_keep_their_signs_and_padding_is_zero(
    workshop: Workshop, llama: Artifact
) -> None:
    plain = workshop.make("init-fdb", {"model": llama}, levels="plain")
    tensors = load_file(plain.path / "model.safetensors")
    for name in LAYERS:
        alpha = tensors[f"{name}.alpha"]
        assert (alpha[0] >= 0).all()
        assert (alpha[1] <= 0).all()
    padded = planes_of(tensors["model.layers.0.mlp.down_proj.weight"], 104)
    assert padded[..., 100:].sum() == 0


def test_each_method_is_better_than_the_one_before(
    workshop: Workshop, llama: Artifact, llama_folder: Path
) -> None:
    errors = [
        squared_error(
            workshop.make("init-fdb", {"model": llama}, method=method, levels=levels),
            llama_folder,
            {},
        )
        for method, levels in (
            ("paper", "plain"),
            ("mse", "plain"),
            ("als", "tied"),
            ("als", "plain"),
            ("als", "offset"),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors == pytest.approx([0.17, 0.124, 0.123, 0.115, 0.101], abs=0.02)


@pytest.mark.parametrize(
    ("method", "levels"), [("paper", "offset"), ("mse", "offset"), ("gptq", "tied")]
)
def test_levels_that_a_method_does_not_find_are_refused(method: str, levels: str) -> None:
    with pytest.raises(ValueError, match=f"method {method}"):
        InitFdbConfig(method=method, levels=levels)


def test_the_calibration_weighs_the_inputs(
    workshop: Workshop, start: Artifact, llama: Artifact, llama_folder: Path, calibration: Artifact
) -> None:
    importance = load_file(calibration.path / "statistics.safetensors")
    plain = workshop.make("init-fdb", {"model": llama})
    assert squared_error(start, llama_folder, importance) < squared_error(
        plain, llama_folder, importance
    )


def test_the_report_tells_the_error_and_the_zeros_of_each_layer(
    workshop: Workshop, llama: Artifact, llama_folder: Path
) -> None:
    outcome = workshop.run("init-fdb", {"model": llama}, method="mse", levels="plain")
    report = json.loads((outcome.artifact.path / "layers.json").read_text())
    assert set(report) == LAYERS
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(outcome.artifact.path / "model.safetensors")
    b1, b2 = planes_of(tensors[f"{name}.weight"], 100).bool()
    assert report[name]["zeros_b1"] == pytest.approx(float((~b1).float().mean()), abs=1e-5)
    assert report[name]["zeros_b2"] == pytest.approx(float((~b2).float().mean()), abs=1e-5)
    assert report[name]["zeros_both"] == pytest.approx(float((~b1 & ~b2).float().mean()), abs=1e-5)
    # 13 bytes a row and plane, and two groups of two scales.
    assert report[name]["bits_per_weight"] == pytest.approx((2 * 13 * 8 + 64) / 100)
    expected = squared_error(outcome.artifact, llama_folder, {})
    assert outcome.metrics["relative_error"] == pytest.approx(expected, rel=0.02)
    assert outcome.metrics["weights"] == sum(layer["weights"] for layer in report.values())


def test_include_and_exclude_are_shell_wildcards_on_names(
    workshop: Workshop, llama: Artifact
) -> None:
    chosen = workshop.make(
        "init-fdb", {"model": llama}, include=("*.mlp.*", "*.q_proj"), exclude=("*.layers.0.*",)
    )
    expected = {name for name in LAYERS if ".layers.1." in name}
    assert quantized(chosen) == {n for n in expected if ".mlp." in n or n.endswith(".q_proj")}
    settings = json.loads((chosen.path / "config.json").read_text())["quantization_config"]
    assert set(settings["modules_to_not_convert"]) == LAYERS - quantized(chosen)


def test_wildcards_that_leave_nothing_tell_how_names_look(
    workshop: Workshop, llama: Artifact
) -> None:
    with pytest.raises(ConfigError, match="no linear layer matches") as caught:
        workshop.make("init-fdb", {"model": llama}, include=("lm_head",))
    assert "model.layers.0.self_attn.q_proj" in caught.value.hint


def test_the_same_inputs_give_the_same_bytes(
    fresh: Workshop, start: Artifact, llama: Artifact, calibration: Artifact
) -> None:
    again = fresh.make("init-fdb", {"model": llama, "calibration": calibration})
    assert again.digest == start.digest
    assert again.path != start.path


def test_layers_with_a_row_that_an_outlier_has_spoilt_are_told_of(
    fresh: Workshop, llama: Artifact, tmp_path: Path
) -> None:
    folder = tmp_path / "outlier"
    shutil.copytree(llama.path, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight"][3, 5] = 5000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    progress = Notes()
    outcome = fresh.run("init-fdb", {"model": fresh.model(folder)}, progress=progress)
    report = json.loads((outcome.artifact.path / "layers.json").read_text())
    assert {each for each, layer in report.items() if layer["coarse_groups"] > 0} == {name}
    (note,) = (each for each in progress.notes if "--levels plain" in each)
    assert name in note

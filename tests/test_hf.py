"""Packed models where people are: transformers' own from_pretrained."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import dbllm_cli.hf
from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.llm.models import load_model
from dbllm_cli.store import Artifact
from tests.conftest import Workshop

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def packed(workshop: Workshop, start: Artifact) -> Path:
    return workshop.make("pack", {"fdb": start}).path


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS.to(model.device)).logits
    return logits


def test_logits_equal_those_of_the_fdb(packed: Path, start: Artifact) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    expected = logits_of(load_model(start.path, torch.float32))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-6)
    assert sum(isinstance(module, FdbLinear) for module in model.modules()) == 14
    assert not model.training


def test_registering_twice_does_not_raise(packed: Path) -> None:
    importlib.reload(dbllm_cli.hf)
    assert AutoModelForCausalLM.from_pretrained(packed).dtype == torch.bfloat16


def test_generate_continues_greedily_as_single_forwards_do(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(packed)("The cat", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(written, ids)


def test_bfloat16_comes_close_to_float32(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    exact = logits_of(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32))
    assert model.dtype == torch.bfloat16
    planes = model.model.layers[0].mlp.up_proj.quantized
    assert (planes.weight.dtype, planes.scales.dtype) == (torch.uint8, torch.float16)
    error = (logits_of(model).float() - exact).norm() / exact.norm()
    assert error < 0.05


def test_changing_the_dtype_leaves_planes_and_scales(packed: Path) -> None:
    exact = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(logits_of(model), logits_of(exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_is_followed(packed: Path, device_map: str | dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, device_map=device_map)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32))
    torch.testing.assert_close(logits_of(model).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_again_it_is_the_same(
    packed: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits_of(again), logits_of(model))
    saved, before = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path, packed)
    )
    assert saved == before


def test_layers_kept_in_full_precision_are_loaded_as_they_are(
    workshop: Workshop, llama: Artifact, tmp_path: Path
) -> None:
    fdb = workshop.make("init-fdb", {"model": llama}, exclude=("*.down_proj",))
    packed = workshop.make("pack", {"fdb": fdb}).path
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, FdbLinear)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


def test_without_the_import_it_stops_with_an_error_that_names_the_layer(packed: Path) -> None:
    script = (
        "import sys, transformers\n"
        "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print('loaded')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(packed)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode != 0
    assert "loaded" not in process.stdout
    assert "mlp.down_proj.weight" in process.stdout + process.stderr


def test_a_newer_format_is_refused(packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "newer")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="packed format 4 is newer"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"levels": "round"}, "round levels are not known"),
        ({"format_version": 2, "scale_format": "float8"}, "format 2 is not read any more"),
    ],
)
def test_unknown_levels_and_the_format_of_8_bit_scales_are_refused(
    changed: dict[str, object], told: str, packed: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        AutoModelForCausalLM.from_pretrained(folder)

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbllm_cli.errors import ConfigError
from dbllm_cli.store import Artifact
from dbllm_cli.store.manifest import build_manifest
from tests.conftest import Workshop


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("init-fdb", {"method": "gptq", "batch_size": 3}),
        ("reconstruct", {"batch_size": 3}),
        ("distill", {"batch_size": 3, "steps": 3}),
    ],
)
def test_the_first_samples_alone_give_what_a_calibration_of_these_would(
    workshop: Workshop,
    training: dict[str, Artifact],
    tmp_path: Path,
    stage: str,
    settings: dict[str, Any],
) -> None:
    inputs = dict(training)
    if stage == "init-fdb":
        del inputs["student"]
    whole = inputs["calibration"]
    folder = shutil.copytree(whole.path, tmp_path / "calibration")
    tokens = load_file(folder / "tokens.safetensors")
    save_file(tokens | {"train": tokens["train"][:3].clone()}, folder / "tokens.safetensors")
    manifest = build_manifest(folder, "calibration", whole.manifest["lineage"], {})
    short = Artifact(folder, "calibration", "5" * 64, manifest)
    first, of_short, all_of_them = (
        load_file(artifact.path / "model.safetensors")
        for artifact in (
            workshop.make(stage, inputs, **settings, num_samples=3),
            workshop.make(stage, inputs | {"calibration": short}, **settings),
            workshop.make(stage, inputs, **settings),
        )
    )
    assert all(torch.equal(first[name], of_short[name]) for name in first)
    assert not all(torch.equal(first[name], all_of_them[name]) for name in first)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [("init-fdb", {"method": "gptq"}), ("reconstruct", {}), ("distill", {"steps": 3})],
)
def test_more_samples_than_there_are_are_refused_before_any_work(
    fresh: Workshop,
    training: dict[str, Artifact],
    stage: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError

    inputs = {
        slot: item for slot, item in training.items() if stage != "init-fdb" or slot != "student"
    }
    for module in ("distill", "init_fdb", "reconstruct"):
        monkeypatch.setattr(f"dbllm_cli.stages.{module}.model_folder", no_work)
    with pytest.raises(ConfigError, match=r"holds 6 sequences .* fewer than the 7") as raised:
        fresh.run(stage, inputs, **settings, num_samples=7)
    assert "--num-samples 6" in raised.value.hint
    assert fresh.store.artifacts() == []

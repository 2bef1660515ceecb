import json
from pathlib import Path
from typing import cast

import pytest
import torch

from dbllm_cli.errors import ConfigError
from dbllm_cli.stages import resuming
from dbllm_cli.stages.resuming import begin_or_resume
from dbllm_cli.stages.spec import Context
from dbllm_cli.store import Artifact, disk
from tests.conftest import Workshop
from tests.stages.conftest import Notes


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / "out", tmp_path, tmp_path / "work", Notes())


@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_auto_is_the_dtype_that_the_device_is_faster_in(
    context: Context, monkeypatch: pytest.MonkeyPatch, faster: torch.dtype
) -> None:
    monkeypatch.setattr(resuming, "faster_dtype", lambda device: faster)
    assert begin_or_resume(context, "auto") == faster


def test_a_dtype_that_is_named_is_taken(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "faster_dtype", lambda device: torch.float32)
    assert begin_or_resume(context, "bfloat16") == torch.bfloat16


def test_a_run_that_goes_on_keeps_the_dtype_it_was_begun_with(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "faster_dtype", lambda device: torch.bfloat16)
    begin_or_resume(context, "auto")
    (context.scratch / "checkpoint-1").mkdir()
    monkeypatch.setattr(resuming, "faster_dtype", lambda device: torch.float32)
    assert begin_or_resume(context, "auto") == torch.bfloat16


def test_a_run_that_goes_on_elsewhere_is_told_to_be_inexact(context: Context) -> None:
    begin_or_resume(context, "float32")
    (context.scratch / "checkpoint-1").mkdir()
    begin_or_resume(context, "float32")
    assert cast(Notes, context.progress).notes == []
    path = context.scratch / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 99}))
    begin_or_resume(context, "float32")
    (note,) = cast(Notes, context.progress).notes
    assert f"threads 99 -> {torch.get_num_threads()}: the result is inexact" in note


def test_a_run_that_an_older_dbllm_began_goes_on_in_the_dtype_of_its_settings(
    context: Context,
) -> None:
    (context.scratch / "environment.json").write_text('{"device": "cpu"}')
    (context.scratch / "checkpoint-1").mkdir()
    assert begin_or_resume(context, "bfloat16") == torch.bfloat16
    assert cast(Notes, context.progress).notes == []


def test_a_run_that_left_nothing_is_begun_anew(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "kernel_name", lambda: "reference")
    begin_or_resume(context, "float32")
    monkeypatch.setattr(resuming, "kernel_name", lambda: "avx2")
    assert begin_or_resume(context, "bfloat16") == torch.bfloat16
    assert cast(Notes, context.progress).notes == []
    begun = json.loads((context.scratch / "environment.json").read_text())
    assert begun["kernel"] == "avx2"


def test_other_kernels_make_a_run_inexact(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "kernel_name", lambda: "avx2")
    begin_or_resume(context, "float32")
    (context.scratch / "checkpoint-1").mkdir()
    monkeypatch.setattr(resuming, "kernel_name", lambda: "reference")
    begin_or_resume(context, "float32")
    (note,) = cast(Notes, context.progress).notes
    assert "kernel avx2 -> reference" in note


def test_a_device_that_is_not_there_leaves_no_record(tmp_path: Path) -> None:
    absent = Context(tmp_path / "out", tmp_path, tmp_path / "work", Notes(), device="cuda:99")
    with pytest.raises(ConfigError):
        begin_or_resume(absent, "auto")
    assert not (tmp_path / "environment.json").exists()


def test_the_manifest_tells_which_dtype_it_was(fresh: Workshop, llama: Artifact) -> None:
    manifest = fresh.calibrate(fresh.model(llama.path), compute_dtype="bfloat16").manifest
    assert manifest["provenance"]["begun"]["compute_dtype"] == "bfloat16"


def test_what_a_run_goes_on_from_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def record(path: Path) -> None:
        names = {each.name for each in tmp_path.iterdir()}
        synced.append(f"{path.name} {'after' if names & {'a.safetensors', 'last-3'} else 'before'}")

    monkeypatch.setattr(disk, "sync", record)
    tensors = {"a": torch.zeros(2)}
    resuming.keep_tensors(tensors, tmp_path / "a.safetensors")
    assert synced == ["a.part before", f"{tmp_path.name} after"]
    synced.clear()
    (tmp_path / "a.safetensors").unlink()
    resuming.save_checkpoint(tmp_path, "last", 3, tensors, {})
    assert {"model.safetensors before", "state.json before"} <= set(synced)
    assert synced[-2:] == [".last before", f"{tmp_path.name} after"]

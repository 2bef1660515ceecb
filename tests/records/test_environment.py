import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dbllm_cli.errors import ArtifactCorruptError, ConfigError
from dbllm_cli.records import environment
from dbllm_cli.records.environment import begin_or_resume
from dbllm_cli.store import Artifact
from tests.conftest import Workshop
from tests.stages.conftest import Notes

Begin = Callable[[str], str]


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def begin(tmp_path: Path, notes: Notes) -> Begin:
    """Begin or resume a run in `tmp_path` with the dtype of the settings; its dtype."""
    return lambda dtype: begin_or_resume(tmp_path, "cpu", dtype, notes).compute_dtype


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_auto_is_the_dtype_that_the_device_is_faster_in(
    begin: Begin, notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    monkeypatch.setattr(environment, "faster_dtype", lambda device: faster)
    assert begin("auto") == faster


def test_a_dtype_that_is_named_is_taken(
    begin: Begin, notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "faster_dtype", lambda device: "float32")
    assert begin("bfloat16") == "bfloat16"


def test_a_run_that_goes_on_keeps_the_dtype_it_was_begun_with(
    begin: Begin, notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "faster_dtype", lambda device: "bfloat16")
    begin("auto")
    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.setattr(environment, "faster_dtype", lambda device: "float32")
    assert begin("auto") == "bfloat16"


def test_a_run_that_goes_on_elsewhere_is_told_to_be_inexact(
    begin: Begin, notes: Notes, tmp_path: Path
) -> None:
    begin("float32")
    (tmp_path / "checkpoint-1").mkdir()
    begin("float32")
    assert notes.notes == []
    path = tmp_path / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 99}))
    begin("float32")
    (note,) = notes.notes
    assert f"threads 99 -> {torch.get_num_threads()}: the result is inexact" in note


def test_a_run_that_left_nothing_is_begun_anew(
    begin: Begin, notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "kernel_name", lambda device: "reference")
    begin("float32")
    monkeypatch.setattr(environment, "kernel_name", lambda device: "avx2")
    assert begin("bfloat16") == "bfloat16"
    assert notes.notes == []
    begun = json.loads((tmp_path / "environment.json").read_text())
    assert begun["kernel"] == "avx2"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"compute_dtype": ["float32"]}', "[" * 10**5])
def test_a_damaged_record_is_told_with_the_folder_to_remove(
    begin: Begin, tmp_path: Path, content: str
) -> None:
    begin("float32")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(ArtifactCorruptError, match=r"environment\.json") as caught:
        begin("float32")
    assert f"remove the folder {tmp_path}" in caught.value.hint


def test_other_kernels_make_a_run_inexact(
    begin: Begin, notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "kernel_name", lambda device: "avx2")
    begin("float32")
    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.setattr(environment, "kernel_name", lambda device: "reference")
    begin("float32")
    (note,) = notes.notes
    assert "kernel avx2 -> reference" in note


def test_a_device_that_is_not_there_leaves_no_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        begin_or_resume(tmp_path, "cuda:99", "auto", Notes())
    assert not (tmp_path / "environment.json").exists()


def test_the_manifest_tells_which_dtype_it_was(fresh: Workshop, llama: Artifact) -> None:
    manifest = fresh.calibrate(fresh.model(llama.path), compute_dtype="bfloat16").manifest
    assert manifest["provenance"]["begun"]["compute_dtype"] == "bfloat16"

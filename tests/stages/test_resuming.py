from pathlib import Path

import pytest
import torch

from dbllm_cli.stages import resuming
from dbllm_cli.stages.resuming import begin_or_resume
from dbllm_cli.stages.spec import Context
from dbllm_cli.store import Artifact
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
    monkeypatch.setattr(resuming, "faster_dtype", lambda device: torch.float32)
    assert begin_or_resume(context, "auto") == torch.bfloat16


def test_a_run_that_an_older_dbllm_began_goes_on_in_the_dtype_of_its_settings(
    context: Context,
) -> None:
    (context.scratch / "environment.json").write_text('{"device": "cpu"}')
    assert begin_or_resume(context, "bfloat16") == torch.bfloat16


def test_the_manifest_tells_which_dtype_it_was(fresh: Workshop, llama: Artifact) -> None:
    manifest = fresh.calibrate(fresh.model(llama.path), compute_dtype="bfloat16").manifest
    assert manifest["provenance"]["begun"]["compute_dtype"] == "bfloat16"

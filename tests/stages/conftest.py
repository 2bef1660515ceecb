import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dbllm_cli.progress import SilentProgress
from dbllm_cli.store import Artifact
from tests.conftest import Workshop

REPOSITORY = Path(__file__).parents[2]
KilledAndResumed = Callable[..., Artifact]


class Notes(SilentProgress):
    """Keeps what was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def ids(calibration: Artifact) -> torch.Tensor:
    """The sequences that are trained on."""
    return load_file(calibration.path / "tokens.safetensors")["train"].long()


@pytest.fixture
def killed_and_resumed(fresh: Workshop) -> KilledAndResumed:
    """Run a stage in a process that dies by -9 once `pattern` is there, then run it again here."""

    def run(stage: str, inputs: Mapping[str, Artifact], pattern: str, **settings: Any) -> Artifact:
        given = {
            slot: {
                "path": str(item.path),
                "kind": item.kind,
                "digest": item.digest,
                "manifest": item.manifest,
            }
            for slot, item in inputs.items()
        }
        settings = {"compute_dtype": "float32"} | settings
        command = [sys.executable, "-m", "tests.stages.killed", str(fresh.store.root), stage]
        process = subprocess.run(
            [*command, json.dumps(settings), json.dumps(given), pattern],
            cwd=REPOSITORY,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert fresh.store.artifacts() == []
        assert any(fresh.store.root.glob(pattern))
        progress = Notes()
        outcome = fresh.run(stage, inputs, progress=progress, **settings)
        assert not [note for note in progress.notes if "inexact" in note]
        assert not any((fresh.store.root / ".scratch").iterdir())
        return outcome.artifact

    return run

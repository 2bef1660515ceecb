"""The command line in a folder of its own, with stages that need no torch."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.app import run
from dbllm_cli.configs import InitFdbConfig, StageConfig
from dbllm_cli.stages.context import Context
from dbllm_cli.stages.context import Result as StageResult
from dbllm_cli.stages.spec import StageSpec
from dbllm_cli.store import Artifact


@dataclass(frozen=True)
class Result:
    """What one command line ended with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def path(self) -> str:
        """The one line of stdout, asserted to be the only one."""
        (line,) = self.out.splitlines()
        return line


@dataclass
class Call:
    """What a fake stage was called with."""

    config: Any
    inputs: dict[str, Artifact]
    device: str
    trust_remote_code: bool


DbllmCall = Callable[..., Result]


@pytest.fixture
def dbllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> DbllmCall:
    """Runs one command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DBLLM_STORE", raising=False)

    def call(*arguments: str) -> Result:
        for stream in (sys.stdout, sys.stderr):  # as Python's own error stream is
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        code = run(arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder that looks like a model from the outside."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return "model"


@pytest.fixture
def stage_calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Puts a body that writes one file in place of every stage's; collects its calls."""
    calls: list[Call] = []

    def body(
        config: StageConfig, inputs: Mapping[str, Artifact], context: Context
    ) -> StageResult[dict[str, Any]]:
        calls.append(Call(config, dict(inputs), context.device, context.trust_remote_code))
        (context.out / "result.txt").write_text(f"{type(config).__name__} {config}")
        if isinstance(config, InitFdbConfig):
            (context.out / "layers.json").write_text('{"0.q_proj": {"error": 0.115}}')
        with context.progress.task("working", total=3) as task:
            task.advance(3, loss=0.5)
        return StageResult({"loss": 0.5, "per_layer": {"mean": 0.25}})

    monkeypatch.setattr(StageSpec, "body", lambda self: body)
    return calls

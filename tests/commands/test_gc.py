"""`gc`: what goes and what stays, with the pipelines and artifacts that are named."""

from pathlib import Path

import pytest

from tests.commands.conftest import Call, DbllmCall

PIPELINE = """\
schema_version: 1
model: {path: model}
steps:
  calibrate: {inputs: {model: model}, config: {num_samples: 8}}
  init-fdb: {inputs: {model: model, calibration: calibrate}}
"""


@pytest.fixture
def pipeline(tmp_path: Path, model: str, stage_calls: list[Call]) -> str:
    (tmp_path / "small.yaml").write_text(PIPELINE)
    return "small.yaml"


def folders() -> set[str]:
    return {path.name for path in Path("artifacts").iterdir() if path.name[0] != "."}


def test_artifacts_of_other_settings_go_and_those_of_the_file_stay(
    dbllm: DbllmCall, pipeline: str
) -> None:
    dbllm("run", pipeline, "--set", "calibrate.num_samples=4")
    before = folders()
    dbllm("run", pipeline)
    told = dbllm("gc", pipeline, "--dry-run")
    assert told.code == 0
    assert "no pipeline given and no --keep needs it" in told.out
    assert "would be freed, 2 folders" in told.err
    assert before < folders()

    assert dbllm("gc", pipeline).code == 0
    assert len(folders()) == 2
    assert not before & folders()
    assert dbllm("run", pipeline).out.count("up to date") == 2


def test_a_kept_artifact_stays_with_what_it_was_made_from(dbllm: DbllmCall, pipeline: str) -> None:
    steps = dbllm("run", pipeline, "--json").json["steps"]
    dbllm("run", pipeline, "--set", "calibrate.num_samples=4")
    result = dbllm("gc", "--keep", steps[-1]["path"], "--json").json
    assert result["removed"] is True
    assert len(result["garbage"]) == 2
    assert result["bytes"] == sum(each["size"] for each in result["garbage"]) > 0
    assert folders() == {Path(step["path"]).name for step in steps}


def test_without_a_pipeline_artifacts_stay(dbllm: DbllmCall, pipeline: str) -> None:
    dbllm("run", pipeline)
    result = dbllm("gc")
    assert result.code == 0
    assert "0 B freed, 0 folders" in result.err
    assert len(folders()) == 2


def test_an_artifact_to_keep_that_is_not_there_removes_nothing(
    dbllm: DbllmCall, pipeline: str
) -> None:
    dbllm("run", pipeline)
    assert dbllm("gc", "--keep", "fdb-000000000000").code == 4
    assert len(folders()) == 2


def test_a_pipeline_without_an_artifact_here_removes_nothing(
    dbllm: DbllmCall, pipeline: str
) -> None:
    dbllm("run", pipeline, "--set", "calibrate.num_samples=4")
    result = dbllm("gc", pipeline)
    assert result.code == 3
    assert "none would stay" in result.err
    assert len(folders()) == 2

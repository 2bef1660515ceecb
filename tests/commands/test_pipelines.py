"""`run` does what `status` and `--dry-run` say, for the steps of a file."""

from pathlib import Path

import pytest

from dbllm_cli.errors import StageFailedError
from dbllm_cli.stages.spec import StageSpec
from tests.commands.conftest import Call, DbllmCall, Result

PIPELINE = """\
schema_version: 1
model: {path: model}
steps:
  calibrate: {inputs: {model: model}, config: {num_samples: 8}}
  init-fdb: {inputs: {model: model, calibration: calibrate}}
  pack: {inputs: {fdb: init-fdb}}
"""


@pytest.fixture
def pipeline(tmp_path: Path, model: str, stage_calls: list[Call]) -> str:
    (tmp_path / "small.yaml").write_text(PIPELINE)
    return "small.yaml"


def actions(result: Result) -> dict[str, str]:
    return {step["step"]: step["action"] for step in result.json["steps"]}


def test_run_makes_every_step_and_prints_their_artifacts(
    dbllm: DbllmCall, pipeline: str, stage_calls: list[Call]
) -> None:
    result = dbllm("run", pipeline)

    assert result.code == 0
    assert len(stage_calls) == 3
    lines = result.out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["calibrate", "init-fdb", "pack"]
    assert all("loss 0.5" in line for line in lines)
    assert "working: 3/3" in result.err


def test_run_json_has_an_object_for_every_step(dbllm: DbllmCall, pipeline: str) -> None:
    result = dbllm("run", pipeline, "--json").json

    assert result["pipeline"] == pipeline
    assert [step["step"] for step in result["steps"]] == ["calibrate", "init-fdb", "pack"]
    for step in result["steps"]:
        assert set(step) == {"step", "path", "kind", "digest", "ran", "seconds", "metrics"}
        assert Path(step["path"], "result.txt").is_file()


def test_a_second_run_makes_nothing(
    dbllm: DbllmCall, pipeline: str, stage_calls: list[Call]
) -> None:
    dbllm("run", pipeline)
    result = dbllm("run", pipeline)

    assert len(stage_calls) == 3
    assert result.out.count("up to date") == 3


def test_dry_run_tells_and_makes_nothing(
    dbllm: DbllmCall, pipeline: str, stage_calls: list[Call]
) -> None:
    result = dbllm("run", pipeline, "--dry-run")

    assert result.code == 0
    assert "never run" in result.out
    assert not stage_calls


def test_plan_json_tells_step_stage_action_reasons_key_and_path(
    dbllm: DbllmCall, pipeline: str
) -> None:
    first = dbllm("run", pipeline, "--dry-run", "--json").json["steps"][0]

    assert set(first) == {"step", "stage", "action", "reasons", "key", "path"}
    assert first["action"] == "run"
    assert first["reasons"] == ["never run"]
    assert first["path"].startswith("artifacts/calibration-")


def test_status_is_the_plan(dbllm: DbllmCall, pipeline: str) -> None:
    assert dbllm("status", pipeline).out == dbllm("run", pipeline, "--dry-run").out
    dbllm("run", pipeline)
    after = dbllm("status", pipeline, "--json")
    assert after.code == 0
    assert set(actions(after).values()) == {"up to date"}


def test_set_changes_a_setting_of_one_step(
    dbllm: DbllmCall, pipeline: str, stage_calls: list[Call]
) -> None:
    dbllm("run", pipeline)
    change = ("--set", "init-fdb.group_size=32")

    assert "group_size 64 -> 32" in dbllm("status", pipeline, *change).out
    dbllm("run", pipeline, *change)
    assert stage_calls[3].config.group_size == 32


def test_force_may_be_repeated(dbllm: DbllmCall, pipeline: str, stage_calls: list[Call]) -> None:
    dbllm("run", pipeline)
    forced = ("--force", "calibrate", "--force", "init-fdb")

    planned = actions(dbllm("run", pipeline, *forced, "--dry-run", "--json"))
    assert planned["calibrate"] == planned["init-fdb"] == "run"
    dbllm("run", pipeline, *forced)
    # The rebuilt artifacts have the same bytes, so pack stays up to date.
    assert len(stage_calls) == 5


def test_only_runs_one_step(dbllm: DbllmCall, pipeline: str, stage_calls: list[Call]) -> None:
    result = dbllm("run", pipeline, "--only", "calibrate", "--json")

    assert [step["step"] for step in result.json["steps"]] == ["calibrate"]
    assert len(stage_calls) == 1


def test_device_and_store_reach_the_steps(
    dbllm: DbllmCall, pipeline: str, stage_calls: list[Call]
) -> None:
    dbllm("run", pipeline, "--device", "cuda", "--store", "mine", "--trust-remote-code")

    assert {(call.device, call.trust_remote_code) for call in stage_calls} == {("cuda", True)}
    assert len(list(Path("mine").glob("packed-*"))) == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run", "absent.yaml"], "absent.yaml"),
        (["run", "small.yaml", "--force", "calibrat"], "calibrate"),
        (["run", "small.yaml", "--only", "distill"], "'distill'"),
        (["run", "small.yaml", "--set", "pack.fromat=dense"], "format"),
        (["status", "small.yaml", "--set", "init-fdb.group_size=12"], "group_size"),
    ],
)
def test_a_wrong_name_or_setting_ends_with_3_before_anything_runs(
    arguments: list[str],
    problem: str,
    dbllm: DbllmCall,
    pipeline: str,
    stage_calls: list[Call],
) -> None:
    result = dbllm(*arguments)

    assert result.code == 3
    assert problem in result.err
    assert result.out == ""
    assert not stage_calls


def test_schema_is_json_with_every_stage(dbllm: DbllmCall) -> None:
    schema = dbllm("schema")

    assert schema.json["type"] == "object"
    assert '"sequence_length"' in schema.out


def test_keep_going_tells_what_failed_and_what_was_left_out(
    dbllm: DbllmCall, pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(config: object, inputs: object, context: object) -> None:
        raise StageFailedError("the scales are nan", "leave the layer out")

    dbllm("run", pipeline, "--only", "calibrate")
    monkeypatch.setattr(StageSpec, "body", lambda self: body)
    result = dbllm("run", pipeline, "--keep-going")
    assert result.code == 6
    assert "the scales are nan" in result.err
    rows = [line.split() for line in result.out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["calibrate", "init-fdb", "pack"]
    assert rows[1][1] == "failed"
    assert rows[2][1:3] == ["left", "out"]
    told = dbllm("run", pipeline, "--keep-going", "--json").json
    assert [step["step"] for step in told["failed"]] == ["init-fdb"]
    assert told["left_out"] == ["pack"]

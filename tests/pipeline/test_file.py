from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.errors import ConfigError
from dbllm_cli.pipeline.file import Pipeline, load_pipeline
from dbllm_cli.stages.spec import STAGES

Load = Callable[..., Pipeline]

QUICKSTART = """\
schema_version: 1
model: {path: builtin:smollm2-135m}
steps:
  calibrate: {inputs: {model: model}, config: {num_samples: 32}}
  init-fdb: {inputs: {model: model, calibration: calibrate}}
  reconstruct: {inputs: {student: init-fdb, model: model, calibration: calibrate}}
  distill: {inputs: {student: reconstruct, model: model, calibration: calibrate}}
  eval-ppl: {inputs: {model: distill, calibration: calibrate}}
  eval-teacher: {stage: eval-ppl, inputs: {model: model, calibration: calibrate}}
  eval-tasks: {inputs: {model: distill}, config: {tasks: [piqa, arc_easy], limit: 500}}
  pack: {inputs: {fdb: distill, evals: [eval-ppl, eval-teacher, eval-tasks]}}
  bench: {inputs: {model: model, packed: pack}}
"""


def test_a_whole_file_becomes_typed_steps(load: Load) -> None:
    pipeline = load()
    steps = {step.name: step for step in pipeline.steps}
    assert pipeline.model.path.endswith("/model")
    assert steps["teacher"].stage.name == "measure"
    assert steps["train"].config.model_dump()["rate"] == 1e-4
    assert steps["train"].config.model_dump()["save_every"] == 5
    assert steps["bind"].inputs == {"fdb": ("train",), "evals": ("measure", "teacher")}
    assert steps["train"].line == 6


def test_the_designs_example_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "quickstart.yaml"
    file.write_text(QUICKSTART)
    assert {step.stage.name for step in load_pipeline(file).steps} == set(STAGES)


def test_steps_come_after_what_feeds_them_whatever_the_files_order(load: Load) -> None:
    early = "  early: {stage: measure, inputs: {model: train}}\n"
    names = [step.name for step in load("steps:\n", f"steps:\n{early}").steps]
    assert names[:4] == ["gather", "start", "train", "early"]


def problem(load: Load, old: str, new: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(old, new, *overrides)
    assert caught.value.exit_code == 3
    return caught.value


@pytest.mark.parametrize(
    ("old", "new", "line", "message", "hint"),
    [
        ("letters: 5", "leters: 5", 4, "has no setting 'leters'", "did you mean letters?"),
        ("letters: 5", "letters: five", 4, "valid integer, got 'five'", "dbllm gather --help"),
        ("letters: 5", "letters: true", 4, "valid integer, got True", "dbllm gather --help"),
        ("letters: 5", "letters: '5'", 4, "valid integer, got '5'", "dbllm gather --help"),
        ("letters: 5", "letters: 0", 4, "greater than 0, got 0", "dbllm gather --help"),
        ("letters: 5", "mode: fats", 4, "got 'fats'", "did you mean fast?"),
        ("rate: 1e-4", "rate: .nan", 8, "finite number", "dbllm train --help"),
        ("rate: 1e-4", "names: x", 8, "valid array, got 'x'", "dbllm train --help"),
        ("  start:", "  strat:", 5, "no stage is called 'strat'", "did you mean start?"),
        ("stage: measure", "stage: mesure", 10, "called 'mesure'", "did you mean measure?"),
        ("stage: measure", "stagge: measure", 10, "unknown key 'stagge'", "did you mean stage?"),
        ("steps:\n", "stesp:\n", 3, "unknown key 'stesp'", "did you mean steps?"),
        ("student: start", "studnet: start", 7, "no input 'studnet'", "did you mean student?"),
        ("student: start", "student: strat", 7, "no step is called 'strat'", "mean start?"),
        ("student: start, ", "", 6, "lacks the input student", "steps that give it: start"),
        ("student: start", "student: gather", 7, "takes fdb; gather gives calibration", "start"),
        ("student: start", "student: model", 7, "takes fdb; model gives model", "start"),
        ("{model: train}", "{model: [train]}", 9, "takes one step, got ['train']", "model: STEP"),
        ("[measure, teacher]", "measure", 11, "takes a list of steps", "evals: [STEP, STEP]"),
        ("schema_version: 1", "schema_version: 2", 1, "must be 1, got 2", "upgrade dbllm"),
        ("schema_version: 1\n", "", 1, "must be 1, got None", "schema_version: 1"),
        ("  teacher: {stage: measure, ", "  start: {", 10, "start stands twice", "keep one"),
        ("teacher: {stage", "model: {stage", 10, "can't be called 'model'", "taken by the model"),
        ("start: {", "start: {stage: measure, ", 5, "name of a stage", "a name of its own"),
        ("config: {letters: 5}", "config: 5", 4, "config of step gather must be a mapping", ""),
        ("model: {path", "model: {revision: 1, path", 2, "must be a string, got 1", "quotes"),
    ],
)
def test_a_mistake_shows_line_cause_and_nearest_name(
    load: Load, tmp_path: Path, old: str, new: str, line: int, message: str, hint: str
) -> None:
    error = problem(load, old, new)
    assert error.message.startswith(f"{tmp_path / 'pipeline.yaml'}:{line}: ")
    assert message in error.message
    assert f"\n  {line} | " in error.message
    assert hint in error.hint


def test_a_cycle_names_its_steps(load: Load) -> None:
    again = "  again: {stage: train, inputs: {student: train, calibration: gather}}\n  train:"
    error = problem(
        load, "  train:\n    inputs: {student: start", f"{again}\n    inputs: {{student: again"
    )
    assert ":6: these steps feed each other in a cycle: again -> train -> again" in error.message
    itself = problem(load, "student: start", "student: train")
    assert "in a cycle: train -> train" in itself.message


def test_a_file_without_model_or_steps_is_told(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    for text, message in [
        ("", "a pipeline file must be a mapping"),
        ("schema_version: 1\nsteps: {a: {}}\n", "model must be a mapping, got None"),
        ("schema_version: 1\nmodel: x\nsteps: {a: }\n", "model must be a mapping, got 'x'"),
        ("schema_version: 1\nmodel: {path: x}\n", "at least one step"),
        ("schema_version: 1\nmodel: {}\nsteps: {a: }\n", "path of model must be a string"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_pipeline(file, ["model.revision=abc"])


def settings(pipeline: Pipeline, name: str) -> dict[str, Any]:
    return next(step.config.model_dump() for step in pipeline.steps if step.name == name)


def test_overrides_replace_settings_and_the_model(load: Load) -> None:
    pipeline = load("", "", "train.steps=80", "train.names=[a, b]", "model.path=owner/name")
    assert settings(pipeline, "train")["steps"] == 80
    assert settings(pipeline, "train")["names"] == ("a", "b")
    assert settings(pipeline, "train")["rate"] == 1e-4
    assert pipeline.model.path == "owner/name"


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("trian.steps=3", "no step is called 'trian'", "did you mean train?"),
        ("train.step=3", "has no setting 'step'", "did you mean steps?"),
        ("train.steps=few", "valid integer, got 'few'", "dbllm train --help"),
        ("train.steps", "not of the form STEP.KEY=VALUE", "distill.steps=80"),
        ("train.names=[", "can't be read", "quotes"),
        ("model.pth=x", "unknown key 'pth'", "did you mean path?"),
    ],
)
def test_a_wrong_override_is_shown_as_it_was_given(
    load: Load, override: str, message: str, hint: str
) -> None:
    error = problem(load, "", "", override)
    assert error.message.startswith(f"--set {override}: ")
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize("value", ["---", "=#", "notes #1.txt", "'x'", "1", "[", "", "*a", "~"])
def test_a_value_for_a_text_is_taken_as_it_stands(load: Load, value: str) -> None:
    for key in ("gather.text", "train.documents"):
        if value:
            step, name = key.split(".")
            pipeline = load("", "", f"{key}={value}")
            (config,) = (each.config for each in pipeline.steps if each.name == step)
            assert getattr(config, name) == value
        else:
            assert "at least 1 character" in problem(load, "", "", f"{key}=").message
    assert load("", "", "model.revision=0123").model.revision == "0123"


def test_null_takes_a_text_away_and_other_settings_are_yaml(load: Load) -> None:
    pipeline = load(
        "{letters: 5}", "{text: x}", "gather.text=null", "train.names=[a, b]", "train.steps=7"
    )
    configs = {step.name: step.config for step in pipeline.steps}
    assert configs["gather"].model_dump()["text"] is None
    assert configs["train"].model_dump()["names"] == ("a", "b")
    assert configs["train"].model_dump()["steps"] == 7


@pytest.mark.parametrize("value", ["x" * 5000, "x/" * 3000, '"a\\0b"', '"\\ud800"'])
def test_a_model_s_path_that_can_t_be_one_is_told_with_its_line(tmp_path: Path, value: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        f"schema_version: 1\nmodel:\n  path: {value}\n"
        "steps:\n  calibrate: {inputs: {model: model}}\n"
    )
    with pytest.raises(
        ConfigError, match=r"x\.yaml:3: path of model, .*can't be a path: "
    ) as caught:
        load_pipeline(file)
    assert len(caught.value.message) < 500


def test_a_setting_without_effect_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "schema_version: 1\nmodel: {path: x}\nsteps:\n  init-fdb:\n    inputs: {model: model}\n"
        "    config:\n      group_size: 32\n      batch_size: 8\n"
    )
    with pytest.raises(ConfigError, match=r"x\.yaml:8: batch_size of .* it needs method gptq"):
        load_pipeline(file)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("init-fdb: {inputs: {model: model}, config: {method: gptq}}", "gptq needs a calibration"),
        ("eval-ppl: {inputs: {model: model}}", "no text, no dataset and no calibration"),
        (
            "eval-ppl: {inputs: {model: model, calibration: calibrate}, config: {stride: 8}}",
            "eval-ppl has no effect: it needs protocol strided",
        ),
        (
            "eval-ppl: {inputs: {model: model, calibration: calibrate}, config: {text: x}}",
            "both a text and a calibration",
        ),
    ],
)
def test_settings_that_don_t_fit_the_inputs_are_told_before_anything_runs(
    tmp_path: Path, step: str, message: str
) -> None:
    file = tmp_path / "x.yaml"
    head = "schema_version: 1\nmodel: {path: x}\nsteps:\n  calibrate: {inputs: {model: model}}\n"
    file.write_text(f"{head}  {step}\n")
    with pytest.raises(ConfigError, match=rf"x\.yaml:5: .*step .*{message}"):
        load_pipeline(file)

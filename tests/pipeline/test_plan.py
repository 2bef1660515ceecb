from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError, ConfigError
from dbllm_cli.pipeline.file import Pipeline
from dbllm_cli.pipeline.lineage import lineage_of
from dbllm_cli.pipeline.plan import plan_pipeline
from dbllm_cli.pipeline.run import run_pipeline
from dbllm_cli.progress import SilentProgress
from dbllm_cli.stages.spec import AnyStage, StageSpec
from dbllm_cli.store import Store, resolve_model

Load = Callable[..., Pipeline]
Shown = dict[str, tuple[str, tuple[str, ...]]]


def show(pipeline: Pipeline, store: Store, **options: object) -> Shown:
    plan = plan_pipeline(pipeline, store, **options)  # type: ignore[arg-type]
    return {planned.step.name: (planned.action, planned.reasons) for planned in plan}


@pytest.fixture
def done(load: Load, store: Store, ran: list[str]) -> Pipeline:
    """The pipeline, run."""
    pipeline = load()
    run_pipeline(pipeline, store, progress=SilentProgress())
    return pipeline


def test_at_first_everything_runs_and_only_the_first_key_is_known(load: Load, store: Store) -> None:
    plan = plan_pipeline(load(), store)
    assert [planned.action for planned in plan] == ["run"] * 7
    assert plan[0].reasons == ("never run",)
    assert plan[0].folder == store.folder("calibration", plan[0].key or "")
    assert plan[1].reasons == ("never run",)
    assert plan[1].key is None


def test_a_plan_makes_no_artifact(load: Load, store: Store) -> None:
    plan_pipeline(load(), store)
    assert not (store.root / ".staging").exists()
    assert store.artifacts() == []


def test_after_a_run_all_but_measurements_of_time_are_up_to_date(
    done: Pipeline, store: Store
) -> None:
    shown = show(done, store)
    assert shown.pop("clock") == ("run", ("always measures",))
    assert set(shown.values()) == {("up to date", ())}


def test_a_changed_setting_is_named_and_reaches_only_what_is_behind_it(
    done: Pipeline, load: Load, store: Store
) -> None:
    shown = show(load("", "", "train.steps=80", "train.keep=true"), store)
    assert shown["start"] == ("up to date", ())
    assert shown["train"] == (
        "run",
        ("setting changed: steps 40 -> 80", "setting changed: keep False -> True"),
    )
    assert shown["measure"] == ("run", ("input step 'train' will run",))
    assert shown["teacher"] == ("up to date", ())


def test_a_setting_that_changes_no_result_runs_nothing(
    done: Pipeline, load: Load, store: Store
) -> None:
    assert show(load("", "", "train.save_every=1"), store)["train"] == ("up to date", ())


def test_the_closest_earlier_run_explains_the_change(
    done: Pipeline, load: Load, store: Store, ran: list[str]
) -> None:
    other = load("", "", "train.steps=7", "train.rate=9", "train.keep=true")
    run_pipeline(other, store, progress=SilentProgress())
    shown = show(load("", "", "train.steps=41"), store)
    assert shown["train"][1] == ("setting changed: steps 40 -> 41",)


def test_a_changed_model_is_named(done: Pipeline, store: Store, model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(b"others!")
    shown = show(done, store)
    assert shown["gather"] == ("run", ("input changed: model",))
    assert shown["teacher"] == ("run", ("input changed: model",))


def test_an_input_given_or_taken_is_named(done: Pipeline, load: Load, store: Store) -> None:
    shown = show(load("start: {inputs: {model: model, calibration: gather}}",
                      "start: {inputs: {model: model}}"), store)  # fmt: skip
    assert shown["start"] == ("run", ("input removed: calibration",))


def test_a_new_version_of_a_stage_is_named(
    done: Pipeline, load: Load, store: Store, stages: dict[str, AnyStage]
) -> None:
    old = stages["train"]
    stages["train"] = StageSpec("train", 2, old.config, old.inputs, "fdb", old.help)
    assert show(load(), store)["train"] == ("run", ("stage version changed: 1 -> 2",))


def test_a_new_version_of_a_package_in_the_key_is_named(
    done: Pipeline, load: Load, store: Store, stages: dict[str, AnyStage]
) -> None:
    stages["train"] = replace(stages["train"], packages=("torch", "no-such-package"))
    (reason,) = show(load(), store)["train"][1]
    assert reason == f"torch changed: none -> {version('torch')}"


def test_an_artifact_whose_key_holds_defaults_is_of_an_older_dbllm(
    load: Load, store: Store, model_folder: Path
) -> None:
    pipeline = load()
    gather = pipeline.steps[0]
    model = resolve_model(str(model_folder), None, store)
    lineage = lineage_of(gather.stage, gather.config, {"model": model}, store)
    older = lineage | {"config": gather.config.model_dump(mode="json")}
    store.publish(store.staging(), "calibration", older, {"step": "gather"})
    assert show(pipeline, store)["gather"] == ("run", ("the key of an older dbllm",))


def test_a_forced_step_says_so(done: Pipeline, store: Store) -> None:
    shown = show(done, store, force=["start"])
    assert shown["gather"] == ("up to date", ())
    assert shown["start"] == ("run", ("forced",))
    assert shown["train"] == ("run", ("input step 'start' will run",))


def test_only_leaves_the_others_out(done: Pipeline, store: Store) -> None:
    shown = show(done, store, only="train", force=["train"])
    assert shown.pop("train") == ("run", ("forced",))
    assert {action for action, _ in shown.values()} == {"left out"}


def test_only_asks_nothing_of_the_steps_it_leaves_out(load: Load, store: Store) -> None:
    pipeline = load("", "", "gather.text=absent.txt")
    with pytest.raises(ConfigError, match=r"absent\.txt can't be read"):
        plan_pipeline(pipeline, store)
    assert show(pipeline, store, only="teacher")["teacher"][0] == "run"
    with pytest.raises(ConfigError, match=r"absent\.txt can't be read"):
        plan_pipeline(pipeline, store, only="start")


def test_only_tells_of_a_damaged_input_and_of_no_other(done: Pipeline, store: Store) -> None:
    folders = {planned.step.name: planned.folder for planned in plan_pipeline(done, store)}
    (folders["gather"] / "content.json").write_text("")
    with pytest.raises(ArtifactCorruptError, match=r"content\.json"):
        plan_pipeline(done, store, only="start")
    plan_pipeline(done, store, only="teacher")


def test_forcing_a_step_that_is_left_out_is_refused(done: Pipeline, store: Store) -> None:
    with pytest.raises(ConfigError, match="--force start has no effect beside --only train"):
        show(done, store, only="train", force=["start"])


def test_only_needs_the_artifacts_of_its_inputs(load: Load, store: Store) -> None:
    with pytest.raises(ArtifactMissingError, match="train needs the artifact of start") as caught:
        plan_pipeline(load(), store, only="train")
    assert "--only start" in caught.value.hint


@pytest.mark.parametrize("options", [{"force": ["trian"]}, {"only": "trian"}])
def test_an_unknown_step_gets_the_nearest_name(
    load: Load, store: Store, options: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="no step 'trian'") as caught:
        show(load(), store, **options)
    assert "did you mean train?" in caught.value.hint


def test_a_model_on_the_hub_is_not_downloaded_for_a_plan(
    load: Load, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbllm_cli.pipeline.plan.resolve_model", lambda *_, **__: None)
    shown = show(load("", "", "model.path=owner/name"), store)
    assert shown["gather"] == ("run", ("model not downloaded yet", "never run"))


def test_a_missing_text_file_stops_the_plan(load: Load, store: Store) -> None:
    with pytest.raises(ConfigError, match=r"text: /nowhere\.txt can't be read"):
        plan_pipeline(load("", "", "gather.text=/nowhere.txt"), store)


def test_damage_is_told_and_not_planned_away(done: Pipeline, store: Store) -> None:
    folder = next(store.root.glob("fdb-*"))
    (folder / "content.json").write_text("")
    with pytest.raises(ArtifactCorruptError, match=r"content\.json has 0 bytes"):
        plan_pipeline(done, store)

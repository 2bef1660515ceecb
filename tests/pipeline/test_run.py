from collections.abc import Callable, Mapping
from typing import Any

import pytest

from dbllm_cli.errors import (
    ConfigError,
    StageFailedError,
    StoppedError,
)
from dbllm_cli.pipeline.file import Pipeline
from dbllm_cli.pipeline.run import run_pipeline
from dbllm_cli.pipeline.stage import Outcome
from dbllm_cli.progress import SilentProgress
from dbllm_cli.stages.context import Context
from dbllm_cli.store import Artifact, Store

Load = Callable[..., Pipeline]
Metrics = dict[str, Any]
Body = Callable[[Any, Mapping[str, Artifact], Context], Metrics]
SetBody = Callable[[str, Body], None]
Run = Callable[..., Outcome]


def run(pipeline: Pipeline, store: Store, **options: Any) -> list[Outcome]:
    return run_pipeline(pipeline, store, progress=SilentProgress(), **options).outcomes


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def test_a_pipeline_runs_every_step_then_only_what_measures(
    load: Load, store: Store, ran: list[str]
) -> None:
    outcomes = run(load(), store)
    assert [outcome.step for outcome in outcomes] == [
        "gather", "start", "train", "measure", "teacher", "bind", "clock",
    ]  # fmt: skip
    assert outcomes[5].metrics == {"inputs": ["fdb", "evals.0", "evals.1"]}
    ran.clear()
    assert [outcome.ran for outcome in run(load(), store)] == [False] * 6 + [True]
    assert ran == ["clock"]


def test_a_forced_step_with_equal_bytes_leaves_later_steps_up_to_date(
    load: Load, store: Store, ran: list[str]
) -> None:
    run(load(), store)
    ran.clear()
    run(load(), store, force=["start"])
    assert ran == ["start", "clock"]


def test_a_forced_step_with_other_bytes_runs_later_steps(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    run(load(), store)
    ran.clear()

    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        (ctx.out / "content.json").write_text("other")
        return {}

    set_body("start", body)
    run(load(), store, force=["start"])
    assert ran == ["train", "measure", "bind", "clock"]


def test_one_step_alone_runs_on_what_the_store_has(
    load: Load, store: Store, ran: list[str]
) -> None:
    run(load(), store)
    ran.clear()
    outcomes = run(load("", "", "train.steps=80"), store, only="train")
    assert [outcome.step for outcome in outcomes] == ["train"]
    assert ran == ["train"]


def test_an_interrupted_pipeline_goes_on_where_it_was(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    def interrupted(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        raise KeyboardInterrupt

    def whole(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        ran.append("train")
        return {}

    set_body("train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(load(), store)
    ran.clear()
    set_body("train", whole)
    run(load(), store)
    assert ran == ["train", "measure", "measure", "bind", "clock"]


def test_a_second_run_fails_at_the_step_that_is_being_made_where_it_may_not_wait(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        if config.steps == 40:
            held = r"train \(fdb-.*\) is held by another run"
            with pytest.raises(StageFailedError, match=held):
                run(load(), store, wait=False)
            run(load("", "", "train.steps=50"), store)
        ran.append(f"train {config.steps}")
        return {}

    set_body("train", body)
    run(load(), store)
    assert [name for name in ran if name.startswith("train")] == ["train 50", "train 40"]


def test_after_a_failure_steps_that_don_t_need_it_go_on_where_they_may(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        raise StageFailedError("the loss is nan", "lower the rate")

    set_body("train", body)
    ended = run_pipeline(load(), store, progress=SilentProgress(), keep_going=True)
    assert [failure.step for failure in ended.failures] == ["train"]
    assert [outcome.step for outcome in ended.outcomes] == ["gather", "start", "teacher"]
    assert ended.left_out == ["measure", "bind", "clock"]
    with pytest.raises(StageFailedError, match="the loss is nan"):
        run_pipeline(load(), store, progress=SilentProgress())


def test_sigterm_stops_a_run_that_keeps_going(
    load: Load, store: Store, ran: list[str], set_body: SetBody
) -> None:
    def body(config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> Metrics:
        raise StoppedError("stopped by SIGTERM")

    set_body("train", body)
    with pytest.raises(StoppedError):
        run_pipeline(load(), store, progress=SilentProgress(), keep_going=True)


def test_after_a_forced_step_the_way_to_go_on_is_told(
    load: Load, store: Store, ran: list[str]
) -> None:
    notes = Notes()
    run_pipeline(load(), store, progress=notes, force=["start"])
    made = next(n for n, line in enumerate(notes.lines) if line.startswith("start: made"))
    assert "leave out --force start" in notes.lines[made + 1]
    assert sum("--force" in line for line in notes.lines) == 1


def test_every_step_tells_how_it_ended(load: Load, store: Store, ran: list[str]) -> None:
    notes = Notes()
    run_pipeline(load(), store, progress=notes)
    run_pipeline(load(), store, progress=notes)
    assert notes.lines[0].startswith("gather: made in 0 s, ")
    assert notes.lines[7].startswith("gather: up to date, ")


def test_a_missing_text_file_stops_before_anything_runs(
    load: Load, store: Store, ran: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere\.txt"):
        run(load("  start: {", "  more: {stage: gather, inputs: {model: model}, "
                 "config: {text: /nowhere.txt}}\n  start: {"), store)  # fmt: skip
    assert ran == []

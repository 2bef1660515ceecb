"""Each stage is a command that prints the path of its artifact, and nothing else, on stdout."""

from pathlib import Path

import pytest

from dbllm_cli.store import Artifact, Store, resolve_input
from tests.commands.conftest import Call, DbllmCall


def test_stdout_carries_only_the_path(
    dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    result = dbllm("calibrate", "model")

    assert result.code == 0
    assert Path(result.path).joinpath("result.txt").is_file()
    assert "working: 3/3" in result.err


def test_commands_chain_by_their_paths(
    dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    calibration = dbllm("calibrate", "model").path
    start = dbllm("init-fdb", "model", calibration).path
    tuned = dbllm("distill", start, "model", calibration).path
    perplexity = dbllm("eval-ppl", tuned, calibration).path
    packed = dbllm("pack", tuned, "--evals", perplexity).path

    assert dbllm("bench", "model", packed).code == 0
    assert len(stage_calls) == 6


def test_inputs_reach_the_stage_by_slot(
    dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    calibration = dbllm("calibrate", "model").path
    start = dbllm("init-fdb", "model").path
    evals = [dbllm("eval-ppl", source, calibration).path for source in (start, "model")]

    dbllm("distill", start, "model", calibration)
    assert {slot: item.kind for slot, item in stage_calls[-1].inputs.items()} == {
        "student": "fdb",
        "model": "model",
        "calibration": "calibration",
    }
    dbllm("pack", start, "--evals", evals[0], "--evals", evals[1])
    assert [str(stage_calls[-1].inputs[f"evals.{index}"].path) for index in (0, 1)] == evals


def test_an_input_may_be_named_as_the_store_names_it(
    dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    name = Path(dbllm("calibrate", "model").path).name

    assert dbllm("init-fdb", "model", name).code == 0
    assert stage_calls[-1].inputs["calibration"].path.name == name


def test_json_is_one_object(dbllm: DbllmCall, stage_calls: list[Call], model: str) -> None:
    result = dbllm("calibrate", "model", "--json").json

    assert set(result) == {"path", "kind", "digest", "ran", "seconds", "metrics"}
    assert result["kind"] == "calibration"
    assert result["ran"] is True
    assert result["metrics"] == {"loss": 0.5, "per_layer": {"mean": 0.25}}
    assert len(result["digest"]) == 64


def test_the_same_command_again_is_up_to_date(
    dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    first = dbllm("calibrate", "model").path
    again = dbllm("calibrate", "model")

    assert again.path == first
    assert "calibrate: up to date" in again.err
    assert dbllm("calibrate", "model", "--json").json["ran"] is False
    assert len(stage_calls) == 1


def test_force_runs_again(dbllm: DbllmCall, stage_calls: list[Call], model: str) -> None:
    first = dbllm("calibrate", "model").path

    assert dbllm("calibrate", "model", "--force").path == first
    assert len(stage_calls) == 2


def test_device_and_trust_reach_the_stage_but_not_the_result(
    dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    first = dbllm("calibrate", "model", "--device", "cuda:1", "--trust-remote-code").path

    assert dbllm("calibrate", "model").path == first
    assert (stage_calls[0].device, stage_calls[0].trust_remote_code) == ("cuda:1", True)


def test_the_store_is_an_option_or_a_variable(
    dbllm: DbllmCall, stage_calls: list[Call], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(dbllm("calibrate", "model").path).parent == Path("artifacts")
    assert Path(dbllm("calibrate", "model", "--store", "mine").path).parent == Path("mine")
    monkeypatch.setenv("DBLLM_STORE", "theirs")
    assert Path(dbllm("calibrate", "model").path).parent == Path("theirs")


def test_the_revisions_of_model_and_dataset_are_two_options(
    dbllm: DbllmCall, stage_calls: list[Call], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def recording(
        reference: str, kinds: tuple[str, ...], store: Store, revision: str | None = None
    ) -> Artifact:
        asked.append(revision)
        return resolve_input(reference, kinds, store)

    monkeypatch.setattr("dbllm_cli.commands.stages.resolve_input", recording)
    dbllm(
        *("calibrate", "model", "--model-revision", "abc"),
        *("--source", "text", "--dataset", "some/text", "--revision", "d" * 40),
    )

    assert asked == ["abc"]
    assert stage_calls[0].config.revision == "d" * 40


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["calibrate", "nowhere"], "nowhere"),
        (["init-fdb", "model", "nowhere"], "no calibration at nowhere"),
        (["pack", "CALIBRATION"], "is of kind calibration; fdb is needed"),
        (["bench", "model", "model"], "not an artifact"),
    ],
)
def test_a_missing_or_wrong_input_is_named_and_ends_with_4(
    arguments: list[str], problem: str, dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    calibration = dbllm("calibrate", "model").path
    result = dbllm(*(calibration if word == "CALIBRATION" else word for word in arguments))

    assert result.code == 4
    assert result.out == ""
    assert problem in result.err
    assert "hint: " in result.err


def test_a_damaged_input_ends_with_5(dbllm: DbllmCall, stage_calls: list[Call], model: str) -> None:
    start = dbllm("init-fdb", "model").path
    Path(start, "result.txt").write_text("cut")

    result = dbllm("pack", start)

    assert result.code == 5
    assert "result.txt" in result.err

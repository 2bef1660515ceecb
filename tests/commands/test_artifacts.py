"""`ls`, `show` and `verify` tell what the store holds and what is damaged."""

import json
import re
from pathlib import Path

import pytest

from tests.commands.conftest import Call, DbllmCall


@pytest.fixture
def calibration(dbllm: DbllmCall, model: str, stage_calls: list[Call]) -> str:
    return dbllm("calibrate", "model").path


@pytest.fixture
def fdb(dbllm: DbllmCall, model: str, calibration: str) -> str:
    return dbllm("init-fdb", "model", calibration).path


def test_an_empty_store_gives_no_data_but_a_word(dbllm: DbllmCall) -> None:
    for command in ("ls", "verify"):
        result = dbllm(command)
        assert (result.code, result.out) == (0, "")
        assert "dbllm run" in result.err


def test_ls_has_a_line_for_every_artifact(dbllm: DbllmCall, calibration: str, fdb: str) -> None:
    lines = dbllm("ls").out.splitlines()

    assert [line.split()[:2] for line in lines[1:]] == [
        [calibration, "calibrate"],
        [fdb, "init-fdb"],
    ]


def test_ls_json_has_an_object_for_every_artifact(dbllm: DbllmCall, calibration: str) -> None:
    (entry,) = dbllm("ls", "--json").json["artifacts"]

    assert entry["path"] == calibration
    assert entry["kind"] == "calibration"
    assert entry["stage"] == "calibrate"
    assert entry["problem"] is None
    assert entry["size"] == sum(
        path.stat().st_size for path in Path(calibration).iterdir() if path.name != "manifest.json"
    )


def test_ls_lists_a_damaged_artifact_with_its_problem(dbllm: DbllmCall, calibration: str) -> None:
    Path(calibration, "result.txt").unlink()

    result = dbllm("ls", "--json")
    assert result.code == 0
    (entry,) = result.json["artifacts"]
    assert entry["path"] == calibration
    assert "result.txt" in entry["problem"]
    assert "result.txt" in dbllm("ls").out


def test_show_tells_settings_metrics_and_lineage(
    dbllm: DbllmCall, calibration: str, fdb: str
) -> None:
    shown = dbllm("show", fdb).out

    assert "stage     init-fdb (version 2)" in shown
    assert re.search(r"group_size +64", shown)
    assert "per_layer.mean  0.25" in shown
    assert f"  calibration: {calibration} (calibrate)\n    model: " in shown


def test_show_of_an_fdb_has_a_table_of_its_layers(dbllm: DbllmCall, fdb: str) -> None:
    lines = dbllm("show", fdb).out.splitlines()

    assert [line.split() for line in lines[-2:]] == [["layer", "error"], ["0.q_proj", "0.115"]]


def test_show_json_has_manifest_metrics_and_lineage(
    dbllm: DbllmCall, calibration: str, fdb: str
) -> None:
    shown = dbllm("show", Path(fdb).name, "--json").json

    assert shown["path"] == fdb
    assert shown["manifest"] == json.loads(Path(fdb, "manifest.json").read_text())
    assert shown["metrics"]["loss"] == 0.5
    inputs = shown["lineage"]["inputs"]
    assert inputs["calibration"]["path"] == calibration
    assert inputs["calibration"]["inputs"]["model"] == inputs["model"]
    assert set(inputs["model"]) == {"digest"}


def test_show_of_a_missing_artifact_ends_with_4(dbllm: DbllmCall) -> None:
    result = dbllm("show", "fdb-nowhere")

    assert result.code == 4
    assert "dbllm ls" in result.err


def test_verify_tells_that_all_is_well(dbllm: DbllmCall, calibration: str, fdb: str) -> None:
    result = dbllm("verify")

    assert result.code == 0
    assert result.out.splitlines() == [f"{calibration}: ok", f"{fdb}: ok"]


def test_verify_finds_one_flipped_byte(dbllm: DbllmCall, calibration: str, fdb: str) -> None:
    path = Path(fdb, "result.txt")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)

    result = dbllm("verify")
    assert result.code == 5
    assert result.out.splitlines()[0] == f"{calibration}: ok"
    assert "result.txt" in result.out.splitlines()[1]
    assert "error: 1 of 2 artifacts damaged\nhint: " in result.err
    assert dbllm("verify", calibration).code == 0
    assert dbllm("verify", fdb).code == 5


def test_verify_tells_of_an_artifact_that_does_not_open(dbllm: DbllmCall, fdb: str) -> None:
    Path(fdb, "manifest.json").write_text("{")

    assert dbllm("verify", fdb).code == 5
    result = dbllm("verify", "--json")
    assert result.code == 5
    problems = {entry["path"]: entry["problems"] for entry in result.json["artifacts"]}
    assert "manifest.json" in problems[fdb][0]


def test_verify_json_is_one_object(dbllm: DbllmCall, calibration: str) -> None:
    assert dbllm("verify", "--json").json == {"artifacts": [{"path": calibration, "problems": []}]}

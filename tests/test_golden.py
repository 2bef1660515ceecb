"""Bytes and defaults change only together with the version of their stage."""

import json
from pathlib import Path

import pytest

from dbllm_cli.stages.spec import STAGES
from tests import golden

RECORDED = json.loads(golden.RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_changed_default_raises_the_stage_s_version(stage: str) -> None:
    now = golden.defaults()[stage]
    then = RECORDED["defaults"].get(stage)
    assert then, f"a new stage: {golden.RETAKE} --defaults"
    assert now["version"] == then["version"], f"{stage} has a new version: {golden.RETAKE}"
    kept = then["settings"].keys() & now["settings"].keys()
    assert {name: now["settings"][name] for name in kept} == {
        name: then["settings"][name] for name in kept
    }, f"keys leave defaults out: raise the version of {stage} in stages/spec.py, {golden.RETAKE}"
    assert now == then, f"{stage} has other settings: {golden.RETAKE} --defaults"


@pytest.mark.model
def test_bytes_change_only_with_the_stage_s_version(tmp_path: Path) -> None:
    here = golden.machine()
    if here != RECORDED["machine"]:
        pytest.skip(f"golden digests are of {RECORDED['machine']}; this is {here}")
    steps = golden.digests(tmp_path)
    assert list(steps) == list(RECORDED["steps"]), f"other steps: {golden.RETAKE}"
    # Later steps read what earlier ones wrote: the first that differs is the cause.
    for name, now in steps.items():
        assert now == RECORDED["steps"][name], (
            f"step {name} writes other bytes: if that is meant, raise the version of {now['stage']}"
            f" in stages/spec.py (recorded: {RECORDED['steps'][name]['version']}), then "
            f"{golden.RETAKE}"
        )

"""No command line, however wrong, is answered with "a bug" (exit code 1)."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbllm_cli.commands.options import option_name
from dbllm_cli.stages.spec import STAGES, AnyStage
from tests.commands.conftest import Call, DbllmCall

VALUES = (
    *("0", "1", "-1", "8", "1e3", "0.5", "-0.0", "nan", "inf", "1e999", "true", "None", "null"),
    *(str(10**9), str(2**31), str(2**63), str(-(2**64)), "9" * 500, "9" * 5000, "0x10", "١٢"),
    *("", " ", "a", "x" * 255, "x" * 256, "x" * 5000, "x/" * 2500, "/", "..", "~", "~nobody/x"),
    *("é", "日本", "a\nb", "a\0b", "\udcff", "\ud800", "\u202e", "---", "=#", "[", "{a: 1}", "*"),
    *("meta", "cpu", "cuda:99999999999999", "cpu:-1", "builtin:", "org/name:x", "config.json"),
    *("model", "model/config.json", "/dev/null", "1:", "5:1", ":" + "9" * 30, "gptq", "text"),
)
RUNNING = ("--store", "--device", "--model-revision")
STEP = """\
schema_version: 1
model: {path: model}
steps:
  calibrate: {inputs: {model: model}}
  init-fdb: {inputs: {model: model, calibration: calibrate}}
"""


def options(spec: AnyStage, chance: random.Random) -> Iterator[str]:
    names = [option_name(name) for name in spec.config.model_fields] + list(RUNNING)
    for name in chance.sample(names, chance.randint(0, 3)):
        yield name
        yield chance.choice(VALUES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_with_random_options_never_ends_with_a_bug(
    stage: str, dbllm: DbllmCall, stage_calls: list[Call], model: str, offline: None
) -> None:
    chance = random.Random(f"options of {stage}")  # noqa: S311 -- choices of tests
    spec = STAGES[stage]
    made = {"model": model, "calibration": dbllm("calibrate", model).path}
    made["student"] = made["fdb"] = dbllm("init-fdb", model).path
    made["packed"] = dbllm("pack", made["fdb"]).path
    for _ in range(20):
        slots = [
            chance.choice(VALUES) if chance.random() < 0.1 else made[slot.name]
            for slot in spec.inputs
            if slot.required
        ]
        line = [stage, *options(spec, chance), "--", *slots]
        result = dbllm(*line)
        assert result.code in (0, 2, 3, 4, 6), (line, result.err)


@pytest.mark.parametrize("command", ["run", "status", "show", "verify", "ls", "generate"])
def test_a_command_with_random_names_never_ends_with_a_bug(
    command: str,
    dbllm: DbllmCall,
    stage_calls: list[Call],
    model: str,
    offline: None,
    tmp_path: Path,
) -> None:
    chance = random.Random(f"names for {command}")  # noqa: S311 -- choices of tests
    (tmp_path / "steps.yaml").write_text(STEP)
    dbllm("run", "steps.yaml")
    own = {
        "run": ("--set", "--only", "--force", "--device"),
        "status": ("--set",),
        "generate": ("--max-new-tokens", "--temperature", "--top-k", "--seed", "--device"),
    }
    names = ("seed", "text", "separator", "batch_size", "exclude", "path", "revision")
    steps = ("calibrate", "init-fdb", "model", "x")
    fields = [f"{step}.{name}" for step in steps for name in names]
    for _ in range(20):
        line = [command]
        for name in chance.choices((*own.get(command, ()), "--store"), k=chance.randint(0, 2)):
            value = chance.choice(VALUES)
            line += [name, f"{chance.choice(fields)}={value}" if name == "--set" else value]
        if command == "generate":
            line += ["--prompt", "x"]
        named = "steps.yaml" if command in ("run", "status") else model
        if command != "ls":
            line += ["--", chance.choice(VALUES) if chance.random() < 0.3 else named]
        result = dbllm(*line)
        assert result.code in (0, 2, 3, 4, 5, 6), (line, result.err)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is asked, and nothing is generated."""
    import huggingface_hub

    from dbllm_cli.llm import generation

    def no_hub(*_: object, **__: object) -> str:
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    monkeypatch.setattr(generation, "generate_stream", lambda *_, **__: iter(["text"]))

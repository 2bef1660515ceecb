"""Each kind of bad input ends with an error of its own that names the thing and the way out."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from dbllm_cli.app import run
from dbllm_cli.errors import (
    ArtifactCorruptError,
    ArtifactMissingError,
    ConfigError,
    DbllmError,
    StageFailedError,
)
from dbllm_cli.pipeline.stage import run_stage
from dbllm_cli.progress import SilentProgress
from dbllm_cli.stages.spec import STAGES
from dbllm_cli.store import Artifact, resolve_input
from dbllm_cli.store.manifest import build_manifest
from tests.conftest import Workshop
from tests.tiny_models import save_model, save_tokenizer

CopyOfLlama = Callable[[], Path]


def with_changed_tensor(source: Path, folder: Path, name: str, value: float | None) -> Path:
    """A copy of a model with one number of a tensor changed, or without the tensor."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def copied(llama_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama_folder, tmp_path / "copied")


NAMES = ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["calibrate", "init-fdb"])
def test_weights_that_are_no_numbers_are_refused_by_name(
    fresh: Workshop, llama_folder: Path, tmp_path: Path, stage: str, name: str, value: float
) -> None:
    model = fresh.model(with_changed_tensor(llama_folder, tmp_path / "bad", name, value))
    settings = {"sequence_length": 16} if stage == "calibrate" else {}
    with pytest.raises(ArtifactCorruptError, match=f"{name} holds NaN or infinity"):
        fresh.run(stage, {"model": model}, **settings)
    assert fresh.store.artifacts() == []


@pytest.mark.parametrize("stage", ["calibrate", "init-fdb"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_lacks_a_tensor_is_refused_not_filled_with_random_numbers(
    fresh: Workshop, llama_folder: Path, tmp_path: Path, stage: str, name: str
) -> None:
    model = fresh.model(with_changed_tensor(llama_folder, tmp_path / "bad", name, None))
    settings = {"sequence_length": 24} if stage == "calibrate" else {}
    with pytest.raises(DbllmError, match=name) as caught:
        fresh.run(stage, {"model": model}, **settings)
    assert caught.value.exit_code in (4, 5)


def test_weights_that_are_cut_off_are_refused(fresh: Workshop, copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactCorruptError, match=r"model\.safetensors can't be read"):
        fresh.run("init-fdb", {"model": fresh.model(copied)})


@pytest.mark.parametrize("stage", ["calibrate", "init-fdb", "eval-ppl"])
def test_an_unknown_architecture_is_refused(
    fresh: Workshop, copied: Path, text_file: Path, stage: str
) -> None:
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "martian", "architectures": ["MartianForCausalLM"]}
    (copied / "config.json").write_text(json.dumps(config))
    settings = {"text": str(text_file)} if stage == "eval-ppl" else {}
    with pytest.raises(ConfigError, match=r"config\.json.*martian"):
        fresh.run(stage, {"model": fresh.model(copied)}, **settings)


def test_a_model_that_is_no_causal_language_model_is_refused(
    fresh: Workshop, tmp_path: Path
) -> None:
    config = T5Config(vocab_size=288, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="t5 is not a causal language model"):
        fresh.run("init-fdb", {"model": fresh.model(tmp_path)})


@pytest.mark.parametrize("stage", ["calibrate", "init-fdb", "eval-ppl"])
def test_a_missing_tokenizer_is_told(
    fresh: Workshop, copied: Path, text_file: Path, stage: str
) -> None:
    for path in copied.glob("tokenizer*"):
        path.unlink()
    settings = {"text": str(text_file)} if stage == "eval-ppl" else {}
    with pytest.raises(ArtifactMissingError, match="no tokenizer"):
        fresh.run(stage, {"model": fresh.model(copied)}, **settings)


def test_a_damaged_tokenizer_is_told(fresh: Workshop, copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{")
    with pytest.raises(DbllmError, match="tokenizer"):
        fresh.run("calibrate", {"model": fresh.model(copied)})


@pytest.mark.parametrize("content", ["", " \n \n"])
@pytest.mark.parametrize("stage", ["calibrate", "eval-ppl"])
def test_an_empty_text_is_told(
    fresh: Workshop, llama: Artifact, tmp_path: Path, stage: str, content: str
) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content)
    settings = {"source": "text", "sequence_length": 24} if stage == "calibrate" else {}
    with pytest.raises(ConfigError, match=r"empty\.txt holds no text"):
        fresh.run(stage, {"model": llama}, text=str(path), **settings)


def test_too_short_a_text_tells_how_much_there_is(
    fresh: Workshop, llama: Artifact, text_file: Path
) -> None:
    with pytest.raises(
        ConfigError, match="gives 25 sequences of 24 tokens, 30 are needed"
    ) as caught:
        fresh.calibrate(llama, source="text", text=str(text_file), num_samples=27)
    assert "num_samples to at most 22" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00bad", "is not UTF-8 text"),
        ("a.parquet", b"not parquet", "is not a parquet file"),
        ("a.jsonl", b'{"text": "fine"}\n{"body": 1}\n', r"a\.jsonl:2: no JSON object"),
        ("a.jsonl", b"not json\n", r"a\.jsonl:1: no JSON object"),
    ],
)
def test_a_text_file_that_can_not_be_read_is_told(
    fresh: Workshop, llama: Artifact, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        fresh.calibrate(llama, source="text", text=str(tmp_path / name))


@pytest.mark.parametrize("stage", ["init-fdb", "reconstruct", "distill"])
def test_the_calibration_of_another_model_is_refused(
    workshop: Workshop,
    start: Artifact,
    llama: Artifact,
    calibration: Artifact,
    tmp_path: Path,
    stage: str,
) -> None:
    other = workshop.model(save_model(tmp_path / "other", "mistral"))
    foreign = workshop.calibrate(other)
    inputs = {"model": llama, "calibration": foreign}
    if stage != "init-fdb":
        inputs["student"] = start
    with pytest.raises(ArtifactMissingError, match="made from another model") as caught:
        workshop.run(stage, inputs)
    assert foreign.path.name in caught.value.message


def test_a_student_of_another_model_is_refused(
    workshop: Workshop, start: Artifact, tmp_path: Path
) -> None:
    other = workshop.model(save_model(tmp_path / "other", "mistral"))
    inputs = {"student": start, "model": other, "calibration": workshop.calibrate(other)}
    with pytest.raises(ArtifactMissingError, match=r"student .* was made from another model"):
        workshop.run("distill", inputs)


@pytest.mark.parametrize("stage", ["pack", "distill"])
def test_a_damaged_fdb_is_told(
    workshop: Workshop, training: dict[str, Artifact], tmp_path: Path, stage: str
) -> None:
    start = training["student"]
    folder = shutil.copytree(start.path, tmp_path / "damaged")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    damaged = Artifact(folder, "fdb", "0" * 64, start.manifest)
    inputs = {"fdb": damaged} if stage == "pack" else training | {"student": damaged}
    with pytest.raises(ArtifactCorruptError, match=r"model\.safetensors"):
        workshop.run(stage, inputs)


def test_the_commands_end_with_the_exit_codes(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", str(tmp_path / "store")]
    model = str(llama_folder)
    bad = str(with_changed_tensor(llama_folder, tmp_path / "bad", NAMES[0], math.nan))
    empty = tmp_path / "empty.txt"
    empty.touch()
    calls = {
        2: ["init-fdb", model, "--group-size", "0"],
        3: ["eval-ppl", model, "--text", str(empty)],
        4: ["init-fdb", str(tmp_path / "nowhere")],
        5: ["init-fdb", bad],
    }
    for code, arguments in calls.items():
        assert run([*arguments, *store]) == code, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err


def test_a_student_that_gives_no_numbers_ends_the_stage(
    fresh: Workshop, training: dict[str, Artifact], tmp_path: Path
) -> None:
    start = training["student"]
    folder = with_changed_tensor(start.path, tmp_path / "bad", "model.norm.weight", math.nan)
    manifest = build_manifest(folder, "fdb", start.manifest["lineage"], {})
    broken = Artifact(folder, "fdb", "1" * 64, manifest)
    with pytest.raises(DbllmError) as caught:
        fresh.run("distill", training | {"student": broken}, steps=1)
    assert isinstance(caught.value, StageFailedError | ArtifactCorruptError)


def test_a_teacher_that_is_already_quantized_is_refused(fresh: Workshop, copied: Path) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactMissingError, match="already quantized by fp8"):
        fresh.model(copied)


@pytest.mark.parametrize("stage", ["calibrate", "init-fdb", "eval-ppl"])
def test_a_device_that_is_not_here_is_told(
    fresh: Workshop, llama: Artifact, text_file: Path, stage: str
) -> None:
    spec = STAGES[stage]
    settings = {"text": str(text_file), "sequence_length": 24} if stage == "eval-ppl" else {}
    with pytest.raises(ConfigError, match="device xpu can't be used"):
        run_stage(
            spec,
            spec.config(**settings),
            {"model": llama},
            fresh.store,
            progress=SilentProgress(),
            device="xpu",
        )


def test_a_calibration_of_another_tokenizer_is_not_evaluated_on(
    fresh: Workshop, calibration: Artifact, copied: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(copied)
    inputs = {"model": fresh.model(copied), "calibration": calibration}
    with pytest.raises(ArtifactMissingError, match="another model's tokenizer"):
        fresh.run("eval-ppl", inputs)


def test_a_text_and_a_calibration_at_once_are_refused(
    fresh: Workshop, llama: Artifact, calibration: Artifact, text_file: Path
) -> None:
    inputs = {"model": llama, "calibration": calibration}
    with pytest.raises(ConfigError, match="both a text and a calibration"):
        fresh.run("eval-ppl", inputs, text=str(text_file), sequence_length=24)


def test_a_packed_folder_of_a_newer_format_asks_for_an_upgrade(
    fresh: Workshop, start: Artifact, tmp_path: Path, text_file: Path
) -> None:
    folder = shutil.copytree(fresh.make("pack", {"fdb": start}).path, tmp_path / "newer")
    (folder / "manifest.json").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 99
    path.write_text(json.dumps(config))
    packed = resolve_input(str(folder), ("model", "packed"), fresh.store)
    with pytest.raises(ArtifactMissingError, match="packed format 99 is newer"):
        fresh.run("eval-ppl", {"model": packed}, text=str(text_file), sequence_length=24)

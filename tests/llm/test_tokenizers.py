"""A tokenizer that can't be opened, and why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError, ConfigError, DbllmError
from dbllm_cli.llm.tokenizers import load_tokenizer


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama_folder, tmp_path / "model")


def name_class(folder: Path, **settings: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def truncate(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_text()
        (folder / name).write_text(content[: len(content) // 2])

    return change


def without_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def sentencepiece_alone(folder: Path) -> None:
    without_vocabulary(folder)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x05")
    name_class(folder, tokenizer_class="LlamaTokenizer")


def unknown_class(folder: Path) -> None:
    without_vocabulary(folder)
    (folder / "vocab.json").write_text("{}")
    name_class(folder, tokenizer_class="NoSuchTokenizer")


def remote_code(folder: Path) -> None:
    name_class(folder, auto_map={"AutoTokenizer": ["code.Own", None]}, tokenizer_class="Own")


def unknown_kind(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"model": {"type": "NoSuchKind"}}))


def not_an_object(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("change", "error", "message", "hint"),
    [
        (truncate("tokenizer.json"), ArtifactCorruptError, r"tokenizer\.json is damaged", "again"),
        (
            truncate("tokenizer_config.json"),
            ArtifactCorruptError,
            "config.json is damaged",
            "again",
        ),
        (not_an_object, ArtifactCorruptError, "config.json is damaged", "again"),
        (unknown_kind, ArtifactCorruptError, "can't be read: .*variant", "newer"),
        (remote_code, ConfigError, "code that comes with the model", "--trust-remote-code"),
        (sentencepiece_alone, ConfigError, r"tokenizer\.model needs", "pip install sentencepiece"),
        (unknown_class, ConfigError, "no tokenizer NoSuchTokenizer", "tokenizer.json"),
        (without_vocabulary, ArtifactMissingError, "has no tokenizer", "copy"),
    ],
)
def test_each_cause_has_a_message_and_a_way_out_of_its_own(
    folder: Path,
    change: Callable[[Path], None],
    error: type[DbllmError],
    message: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(folder)
    monkeypatch.setattr("dbllm_cli.llm.tokenizers.is_sentencepiece_available", lambda: False)
    with pytest.raises(error, match=message) as raised:
        load_tokenizer(folder)
    assert hint in raised.value.hint


def test_code_of_the_model_that_is_not_there_is_damage_where_it_is_trusted(folder: Path) -> None:
    remote_code(folder)
    with pytest.raises(ArtifactCorruptError, match=r"code\.py"):
        load_tokenizer(folder, trust_remote_code=True)


def test_transformers_says_nothing_beside_the_message(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentencepiece_alone(folder)
    verbosity = transformers_logging.get_verbosity()
    with pytest.raises(DbllmError):
        load_tokenizer(folder)
    assert capsys.readouterr().err == ""
    assert transformers_logging.get_verbosity() == verbosity

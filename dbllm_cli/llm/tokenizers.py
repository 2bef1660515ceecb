"""Opening a model's tokenizer, and telling why it can't be opened."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from dbllm_cli.errors import (
    ArtifactCorruptError,
    ArtifactMissingError,
    ConfigError,
    DbllmError,
    first_line,
)
from dbllm_cli.llm.quiet import quiet_transformers

_CONFIG = "tokenizer_config.json"
_JSON_FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "vocab.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ArtifactMissingError: the folder has none.
        ArtifactCorruptError: its files are damaged.
        ConfigError: it needs code that comes with the model, a package that is not installed, or a
            class that transformers does not know.
    """
    if not any((folder / name).is_file() for name in (*_VOCABULARIES, _CONFIG)):
        raise _missing(folder)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # `tokenizers` raises nothing more special
        raise _cause(folder, trust_remote_code, error) from error
    return tokenizer


def _missing(folder: Path) -> ArtifactMissingError:
    return ArtifactMissingError(
        f"{folder} has no tokenizer (tokenizer.json)", "copy the model's tokenizer files into it"
    )


def _cause(folder: Path, trust_remote_code: bool, error: Exception) -> DbllmError:
    """Why transformers failed, as the files tell: its own messages name one cause for many."""
    files = {name for name in (*_JSON_FILES, *_VOCABULARIES) if (folder / name).is_file()}
    for name in _JSON_FILES:
        if name in files and not isinstance(_content(folder / name), dict):
            return ArtifactCorruptError(
                f"{folder / name} is damaged: it is no JSON object",
                "copy or download the tokenizer's files again",
            )
    settings: dict[str, Any] = _content(folder / _CONFIG) if _CONFIG in files else {}
    if "auto_map" in settings and not trust_remote_code:
        return ConfigError(
            f"the tokenizer of {folder} is code that comes with the model",
            "read that code, and add --trust-remote-code if you trust it",
        )
    if "tokenizer.json" not in files:
        return _cause_without_tokenizer_json(folder, files, settings, error)
    return _unreadable(folder, error)


def _cause_without_tokenizer_json(
    folder: Path, files: set[str], settings: dict[str, Any], error: Exception
) -> DbllmError:
    named = settings.get("tokenizer_class")
    if isinstance(named, str) and tokenizer_class_from_name(named) is None:
        return ConfigError(
            f"transformers has no tokenizer {named}, which {folder / _CONFIG} names",
            "upgrade transformers, or copy the model's tokenizer.json into the folder",
        )
    if not files.intersection(_VOCABULARIES):
        return _missing(folder)
    reads = is_sentencepiece_available() and is_protobuf_available()
    if "tokenizer.model" in files and not reads:
        return ConfigError(
            f"{folder / 'tokenizer.model'} needs the packages sentencepiece and protobuf",
            "pip install sentencepiece protobuf, or copy the model's tokenizer.json into it",
        )
    return _unreadable(folder, error)


def _unreadable(folder: Path, error: Exception) -> DbllmError:
    reason = first_line(error)
    if isinstance(error, ImportError):
        return ConfigError(f"the tokenizer of {folder} needs a package: {reason}", "install it")
    return ArtifactCorruptError(
        f"the tokenizer of {folder} can't be read: {reason}",
        "copy or download its files again; one of a newer kind needs a newer transformers",
    )


def _content(path: Path) -> Any:
    """What a JSON file holds; None where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None

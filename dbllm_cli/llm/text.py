"""Text from files and datasets, and its tokens."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dbllm_cli.errors import ConfigError, first_line

_PLAIN, _JSON_LINES, _PARQUET = "plain", "JSON lines", "parquet"
_FORMATS = dict.fromkeys((".txt", ".raw", ".tokens", ".md"), _PLAIN)
_FORMATS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), _JSON_LINES) | {".parquet": _PARQUET}
DOCUMENT_GAP = "\n\n"


@dataclass(frozen=True)
class TextSource:
    """Where documents come from: a local file or folder, or a dataset of the hub.

    Attributes:
        text: path of a text, JSONL or parquet file, or of a folder of them. The suffix, in whatever
            case, tells which it is; a file without a suffix, named itself, is plain text.
        dataset: NAME or NAME:CONFIG of a dataset, when `text` is None.
        documents: range START:STOP, or None for all.
        separator: splits a text file into documents; a text file is one document without it.
    """

    text: str | None
    dataset: str | None
    revision: str | None
    split: str
    text_field: str
    documents: str | None
    separator: str | None

    def read(self) -> list[str]:
        """The documents, in order.

        Raises:
            ConfigError: nothing there, no such column, no text in it, or a file of another kind.
        """
        start, _, stop = (self.documents or ":").partition(":")
        everything = self._from_files() if self.text is not None else self._from_dataset()
        found = list(islice(everything, int(start or 0), int(stop) if stop else None))
        if not any(document.strip() for document in found):
            raise ConfigError(f"{self.text or self.dataset} holds no text", "give another file")
        return found

    def is_plain_text(self) -> bool:
        """Whether it is one text file, to be read as it is or line by line.

        Raises:
            ConfigError: it is a file of a kind that is not read.
        """
        path = Path(self.text or "")
        return self.text is not None and path.is_file() and _format_of(path) == _PLAIN

    def read_raw(self) -> str:
        """A single text file as one string.

        Raises:
            ConfigError: not a text file, or an empty one.
        """
        if self.documents is not None or self.separator is not None:
            raise ConfigError(
                "a text file is read whole here, without documents or separator",
                "use --protocol documents for a file of many documents",
            )
        if not self.is_plain_text():
            raise ConfigError(
                f"reading raw needs a text file, got {self.text or self.dataset}",
                "use --reading wikitext-rows for rows of parquet, JSONL and datasets",
            )
        path = Path(self.text or "")
        content = _read_text(path)
        if not content.strip():
            raise ConfigError(f"{path} holds no text", "give another file")
        return content

    def _from_files(self) -> Iterator[str]:
        path = Path(self.text or "")
        if not path.exists():
            raise ConfigError(f"{path} does not exist", "check the path given as text")
        files = [path]
        if path.is_dir():
            known = (file for file in path.rglob("*") if file.suffix.lower() in _FORMATS)
            files = sorted(file for file in known if file.is_file())
            if not files:
                raise ConfigError(f"{path} holds no {', '.join(_FORMATS)} file", "name a file")
        for file in files:
            yield from self._documents_of(file)

    def _documents_of(self, file: Path) -> Iterator[str]:
        kind = _format_of(file)
        if kind == _PARQUET:
            yield from _parquet_column(file, self.text_field)
        elif kind == _JSON_LINES:
            yield from _jsonl_field(file, self.text_field)
        elif self.separator is not None:
            parts = _read_text(file).split(self.separator)
            yield from (part.strip() for part in parts if part.strip())
        else:
            yield _read_text(file)

    def _from_dataset(self) -> Iterator[str]:
        from datasets import load_dataset

        name, _, config = (self.dataset or "").partition(":")
        if Path(name).exists():  # which `load_dataset` would read, and no revision pins
            raise ConfigError(f"dataset {name} is a path here", f"name it as text: --text {name}")
        try:
            rows = load_dataset(name, config or None, split=self.split, revision=self.revision)
        except Exception as error:
            raise ConfigError(
                f"dataset {self.dataset} can't be loaded: {first_line(error)}",
                "check its name, revision and the network, or give a local file as text",
            ) from error
        if self.text_field not in rows.column_names:
            raise ConfigError(
                f"dataset {self.dataset} has no column {self.text_field}",
                f"set text_field to one of {', '.join(rows.column_names)}",
            )
        yield from _texts(rows[self.text_field], f"column {self.text_field} of {self.dataset}")


def _format_of(path: Path) -> str:
    """How a file is read, by its suffix."""
    suffix = path.suffix.lower()
    if suffix and suffix not in _FORMATS:
        raise ConfigError(
            f"{path}: {suffix} files are not read as text",
            f"give one of {', '.join(_FORMATS)}; plain text of another name: rename it to .txt",
        )
    return _FORMATS.get(suffix, _PLAIN)


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} can't be read: {error.strerror or error}", "check its permissions")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}", "convert it to UTF-8") from error


def _texts(values: Iterable[object], what: str) -> Iterator[str]:
    """Those values that are there."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise ConfigError(f"{what} holds {value!r}, no text", "set text_field to another")


def _parquet_column(path: Path, column: str) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        if column not in names:
            raise ConfigError(
                f"{path} has no column {column}", f"set text_field to one of {', '.join(names)}"
            )
        values = parquet.read_table(path, columns=[column])[column].to_pylist()
        return list(_texts(values, f"column {column} of {path}"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not a parquet file: {error}", "give another file") from error


def _jsonl_field(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{path}:{number}: no JSON object with the field {field}", "set text_field"
            ) from error
        yield from _texts([value], f"{path}:{number}: field {field}")


def wikitext_rows(content: str) -> list[str]:
    """The rows of the `datasets` version of WikiText from the raw file: lines, blank ones empty."""
    return ["" if line.strip() == "" else line for line in io.StringIO(content, newline="\n")]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """Token ids of a text, with the tokenizer's own special tokens once unless told not to."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: most often BOS, or nothing."""
    with_special, plain = tokenize(tokenizer, "a"), tokenize(tokenizer, "a", special=False)
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def document_stream(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], needed: int | None = None
) -> list[int]:
    """Tokens of documents one after the other, each begun as the tokenizer begins a text.

    A tokenizer that adds nothing gets two newlines between documents.

    Args:
        tokenizer: the model's.
        documents: texts.
        needed: stop after so many tokens.
    """
    gap = [] if leading_special_tokens(tokenizer) else tokenize(tokenizer, DOCUMENT_GAP)
    stream: list[int] = []
    for document in documents:
        if needed is not None and len(stream) >= needed:
            break
        if stream:
            stream += gap
        stream += tokenize(tokenizer, document)
    return stream


def windows(stream: list[int], sequence_length: int) -> Tensor:
    """Non-overlapping windows int64 `[n, sequence_length]` of tokens; the tail is dropped."""
    count = len(stream) // sequence_length
    cut = torch.tensor(stream[: count * sequence_length], dtype=torch.int64)
    return cut.view(count, sequence_length)


def tokens_digest(ids: Tensor) -> str:
    """Hex sha256 of token ids, as int32 little endian."""
    return hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of the vocabulary and the special tokens."""
    content = {
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from dbllm_cli.configs import EvalPplConfig
from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.text import (
    TextSource,
    document_stream,
    leading_special_tokens,
    tokenize,
    tokenizer_digest,
    tokens_digest,
    wikitext_rows,
    windows,
)
from tests.llm.conftest import shared_data


def _source(text: Path | None, **changes: Any) -> TextSource:
    settings: dict[str, Any] = {
        "dataset": None,
        "revision": None,
        "split": "train",
        "text_field": "text",
        "documents": None,
        "separator": None,
    }
    return TextSource(None if text is None else str(text), **settings | changes)


def _jsonl(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def _parquet(path: Path, columns: dict[str, Any]) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def test_a_text_file_is_one_document_unless_a_separator_splits_it(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("One.\n<|end|>\n Two.<|end|>\n", encoding="utf-8")
    assert _source(path).read() == ["One.\n<|end|>\n Two.<|end|>\n"]
    assert _source(path, separator="<|end|>").read() == ["One.", "Two."]


def test_jsonl_gives_the_named_field_of_each_line(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", ["first", "zweite – ß"])
    assert _source(path).read() == ["first", "zweite – ß"]


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", ["one\u2028two", "three\x85four"])
    assert _source(path).read() == ["one\u2028two", "three\x85four"]


def test_parquet_gives_the_named_column(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": ["x", "y"], "body": ["first", "second"]})
    assert _source(path, text_field="body").read() == ["first", "second"]


def test_a_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    rows = _parquet(tmp_path / "rows.parquet", {"id": [1, 2]})
    with pytest.raises(ConfigError, match=r"column id of .* holds 1, no text"):
        _source(rows, text_field="id").read()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_without_text_never_becomes_the_word_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text('{"text": "some"}\n{"text": null}\n')
    else:
        _parquet(path, {"text": ["some", None]})
    try:
        documents = _source(path).read()
    except ConfigError:
        return
    assert all(isinstance(document, str) for document in documents)
    assert [document for document in documents if document] == ["some"]


def test_a_folder_gives_the_documents_of_its_files_in_the_order_of_their_paths(
    tmp_path: Path,
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "b.txt").write_text("from b")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    _jsonl(tmp_path / "a.jsonl", ["from a"])
    _parquet(tmp_path / "inner" / "c.parquet", {"text": ["from c"]})
    assert _source(tmp_path).read() == ["from a", "from b", "from c"]


@pytest.mark.parametrize(
    ("documents", "kept"), [("1:3", [1, 2]), (":2", [0, 1]), ("3:", [3, 4]), (":", [0, 1, 2, 3, 4])]
)
def test_a_range_of_documents_can_be_read(tmp_path: Path, documents: str, kept: list[int]) -> None:
    path = _jsonl(tmp_path / "a.jsonl", [str(n) for n in range(5)])
    assert _source(path, documents=documents).read() == [str(n) for n in kept]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl:2"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', "a.jsonl:2: field text holds 1, no text"),
        ("a.parquet", b"PAR0 garbage that is no parquet", "not a parquet file"),
    ],
)
def test_files_that_can_t_be_read_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        _source(tmp_path / name).read()


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", {"body": ["x"], "url": ["y"]})
    with pytest.raises(ConfigError, match="no column text") as raised:
        _source(path).read()
    assert "body, url" in raised.value.hint


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        _source(tmp_path / "absent.txt").read()
    with pytest.raises(ConfigError, match=r"holds no \.txt"):
        _source(tmp_path).read()


def test_a_range_beyond_the_last_document_holds_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no text"):
        _source(_jsonl(tmp_path / "a.jsonl", ["x"]), documents="5:9").read()


def test_a_text_file_can_be_read_raw(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Title = \n")
    assert _source(path).read_raw() == " \n = Title = \n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "absent.txt", "."])
def test_rows_and_folders_can_t_be_read_raw(tmp_path: Path, name: str) -> None:
    if name.startswith("a."):
        (tmp_path / name).write_text('{"text": "x"}')
    with pytest.raises(ConfigError, match="reading raw needs a text file"):
        _source(tmp_path / name).read_raw()


def test_a_dataset_gives_its_column_at_the_revision_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["x", None, "y"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = _source(None, dataset="owner/name:part", revision="abc", split="test")
    assert source.read() == ["x", "y"]
    assert asked == [(("owner/name", "part"), {"split": "test", "revision": "abc"})]
    with pytest.raises(ConfigError, match="no column body"):
        _source(None, dataset="owner/name", revision="abc", text_field="body").read()


def test_a_folder_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a path here") as caught:
        _source(None, dataset=str(tmp_path), revision="abc").read()
    assert f"--text {tmp_path}" in caught.value.hint


@pytest.mark.parametrize("revision", [None, "main", "abc123"])
def test_a_dataset_is_pinned_to_a_commit(revision: str | None) -> None:
    with pytest.raises(ValueError, match="40 digits of a commit"):
        EvalPplConfig(dataset="owner/name", revision=revision)
    assert EvalPplConfig(dataset="owner/name", revision="0f" * 20).revision == "0f" * 20


@pytest.mark.parametrize("error", [ConnectionError("no network\nat all"), ConnectionError()])
def test_a_dataset_that_can_t_be_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError, match="dataset owner/name can't be loaded"):
        _source(None, dataset="owner/name", revision="abc").read()


def test_rows_of_wikitext_keep_their_newline_and_blank_ones_are_empty() -> None:
    content = " \n = Title = \n \n Text with\u2028a separator . \n"
    assert wikitext_rows(content) == ["", " = Title = \n", "", " Text with\u2028a separator . \n"]


@pytest.mark.shared_data
def test_wikitext_has_the_rows_of_the_datasets_version() -> None:
    path = shared_data("text", "wikitext-2-raw", "wiki.test.raw")
    rows = wikitext_rows(_source(path).read()[0])
    assert len(rows) == 4358
    assert rows[:3] == ["", " = Robert Boulter = \n", ""]


class _Letters:
    """A tokenizer of one token a letter, with what it puts around a text."""

    def __init__(self, before: list[int], after: list[int]) -> None:
        self._before, self._after = before, after

    def __call__(self, text: str, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [*self._before, *ids, *self._after] if add_special_tokens else ids}


def _letters(before: list[int], after: list[int]) -> PreTrainedTokenizerBase:
    return cast(PreTrainedTokenizerBase, _Letters(before, after))


@pytest.mark.parametrize("after", [[], [2]])
@pytest.mark.parametrize("before", [[], [1], [1, 7]])
def test_what_a_tokenizer_puts_before_a_text_is_found(before: list[int], after: list[int]) -> None:
    assert leading_special_tokens(_letters(before, after)) == before


def test_documents_begin_as_the_tokenizer_begins_a_text_or_two_newlines_part_them() -> None:
    a, b, newline = ord("a"), ord("b"), ord("\n")
    assert document_stream(_letters([1], []), ["a", "bb"]) == [1, a, 1, b, b]
    assert document_stream(_letters([], []), ["a", "bb"]) == [a, newline, newline, b, b]


def test_a_stream_stops_after_the_document_that_reaches_the_tokens_needed() -> None:
    stream = document_stream(_letters([1], []), ["aaa", "bbb", "ccc"], needed=5)
    assert len(stream) == 8


@pytest.mark.shared_data
def test_the_stories_tokenizer_begins_every_document_with_bos_once(
    stories_tokenizer: PreTrainedTokenizerBase,
) -> None:
    bos = stories_tokenizer.bos_token_id
    assert leading_special_tokens(stories_tokenizer) == [bos]
    assert tokenize(stories_tokenizer, "Once upon a time")[0] == bos
    assert bos not in tokenize(stories_tokenizer, "Once upon a time", special=False)
    stream = document_stream(stories_tokenizer, ["Once upon a time", "There was a dog"])
    assert stream.count(bos) == 2
    assert stories_tokenizer.decode(stream, skip_special_tokens=True).count("There was a dog") == 1


@pytest.mark.shared_data
def test_the_digest_of_a_tokenizer_follows_its_vocabulary(
    stories_tokenizer: PreTrainedTokenizerBase, stories_folder: Path
) -> None:
    from dbllm_cli.llm.tokenizers import load_tokenizer

    again = load_tokenizer(stories_folder)
    assert tokenizer_digest(again) == tokenizer_digest(stories_tokenizer)
    again.add_tokens(["a new word"])
    assert tokenizer_digest(again) != tokenizer_digest(stories_tokenizer)


def test_the_digest_of_a_tokenizer_follows_its_special_tokens() -> None:
    def tokenizer(bos: str) -> PreTrainedTokenizerBase:
        content = SimpleNamespace(get_vocab=lambda: {"a": 0}, special_tokens_map={"bos_token": bos})
        return cast(PreTrainedTokenizerBase, content)

    assert tokenizer_digest(tokenizer("<s>")) != tokenizer_digest(tokenizer("<t>"))


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    cut = windows(list(range(11)), 4)
    assert cut.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut.dtype == torch.int64
    assert windows([1, 2], 4).shape == (0, 4)


def test_the_digest_of_tokens_follows_ids_and_not_their_dtype() -> None:
    ids = torch.arange(6)
    assert tokens_digest(ids) == tokens_digest(ids.to(torch.int32))
    assert tokens_digest(ids) != tokens_digest(ids.flip(0))

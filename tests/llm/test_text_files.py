"""Which files are read as text, and how their suffixes tell."""

import json
from pathlib import Path

import pytest

from dbllm_cli.errors import ConfigError
from dbllm_cli.llm.text import TextSource

ROWS = '{"text": "one"}\n{"text": "two"}\n'


def source(path: Path) -> TextSource:
    return TextSource(str(path), None, None, "train", "text", None, None)


@pytest.mark.parametrize("name", ["d.jsonl", "d.JSONL", "d.ndjson", "d.Json"])
def test_json_lines_are_read_by_their_suffix_in_whatever_case(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(ROWS)
    for path in (tmp_path / name, tmp_path):
        assert source(path).read() == ["one", "two"]
    assert not source(tmp_path / name).is_plain_text()


@pytest.mark.parametrize("name", ["d.txt", "d.TXT", "d.Md", "no suffix"])
def test_plain_text_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(ROWS)
    assert source(tmp_path / name).read() == [ROWS]
    assert source(tmp_path / name).read_raw() == ROWS


@pytest.mark.parametrize("name", ["d.csv", "d.TSV", "d.jsonl.gz", "d.txt.zip", "d.pdf"])
def test_other_files_are_refused_with_those_that_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(ROWS)
    for read in (TextSource.read, TextSource.read_raw, TextSource.is_plain_text):
        with pytest.raises(ConfigError, match=f"{name}: .* files are not read as text") as raised:
            read(source(tmp_path / name))
        assert ".txt" in raised.value.hint
        assert ".ndjson" in raised.value.hint


def test_folders_within_a_folder_are_no_files_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "old.txt").mkdir()
    (tmp_path / "old.txt" / "a.txt").write_text("within")
    (tmp_path / "z.txt").write_text("beside")
    assert source(tmp_path).read() == ["within", "beside"]


@pytest.mark.parametrize("name", ["d.txt", "d.jsonl", "d.parquet"])
def test_a_file_that_can_t_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()  # as a file without permission is, for root too
    with pytest.raises(ConfigError, match=f"{name} can't be read"):
        list(source(tmp_path)._documents_of(tmp_path / name))


def test_a_line_that_nests_too_deep_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(ConfigError, match=r"d\.jsonl:2"):
        source(path).read()

import json
import os
from pathlib import Path

import pytest

from dbllm_cli.store import digest
from dbllm_cli.store.digest import DigestCache, canonical_json, digest_of, files_digest

WEIGHTS = b"a weight " * 2**17


def age(path: Path) -> None:
    """Set the file's time back, so that the cache takes it for settled."""
    os.utime(path, ns=(10**18, 10**18))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were really hashed."""
    names: list[str] = []
    real = digest.file_sha256

    def watched(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(digest, "file_sha256", watched)
    return names


def test_the_order_of_keys_does_not_change_a_digest() -> None:
    assert digest_of({"a": 1, "b": [2, "é"]}) == digest_of({"b": [2, "é"], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_not_a_number_has_no_canonical_text() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_an_unchanged_file_is_hashed_once_even_by_a_later_process(
    tmp_path: Path, hashed: list[str]
) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(WEIGHTS)
    age(model)
    first = DigestCache(tmp_path / "cache.json").sha256(model)
    second = DigestCache(tmp_path / "cache.json").sha256(model)
    assert first == second
    assert hashed == ["model.bin"]


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "cache.json")
    model = tmp_path / "model.bin"
    model.write_bytes(WEIGHTS)
    age(model)
    before = cache.sha256(model)
    model.write_bytes(WEIGHTS[::-1])
    assert cache.sha256(model) != before


def test_a_file_written_just_now_is_not_trusted_to_stay(tmp_path: Path, hashed: list[str]) -> None:
    cache = DigestCache(tmp_path / "cache.json")
    model = tmp_path / "model.bin"
    model.write_bytes(WEIGHTS)
    cache.sha256(model)
    cache.sha256(model)
    assert hashed == ["model.bin", "model.bin"]


def test_a_small_file_is_hashed_each_time_and_not_remembered(tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text("words")
    age(small)
    DigestCache(tmp_path / "cache.json").sha256(small)
    assert not (tmp_path / "cache.json").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"x": 3}', '{"x": [1, 2]}'])
def test_a_damaged_cache_is_ignored(tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(WEIGHTS)
    age(model)
    file = tmp_path / "cache.json"
    file.write_text(damage)
    expected = digest.file_sha256(model)
    assert DigestCache(file).sha256(model) == expected
    assert str(model) in json.loads(file.read_text())


def test_a_folders_digest_covers_names_and_bytes(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "cache.json")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    before = files_digest(folder, cache)
    (folder / "a.txt").rename(folder / "b.txt")
    renamed = files_digest(folder, cache)
    (folder / "b.txt").write_text("two")
    assert len({before, renamed, files_digest(folder, cache)}) == 3


def test_what_python_caches_beside_task_files_is_no_part_of_a_folder(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "cache.json")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "functions.py").write_text("one = 1")
    before = files_digest(folder, cache)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "functions.cpython-311.pyc").write_bytes(b"compiled")
    assert files_digest(folder, cache) == before

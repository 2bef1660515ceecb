from collections.abc import Iterator
from pathlib import Path

import pytest

from dbllm_cli import registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package's folder with the folder `shapes`."""
    monkeypatch.setattr(registry, "_PACKAGE", tmp_path)
    registry.registered.cache_clear()
    (tmp_path / "shapes").mkdir()
    yield tmp_path
    registry.registered.cache_clear()


def write(package: Path, name: str, text: str) -> None:
    (package / "shapes" / name).write_text(text)


def test_a_file_is_a_name_and_its_first_line_says_what_it_is(package: Path) -> None:
    write(package, "square.py", '"""Four equal sides.\n\nMore of it.\n"""\nimport nothing_there\n')
    write(package, "circle.py", '"""No sides at all."""\n')
    assert registry.registered("shapes") == {
        "circle": "no sides at all",
        "square": "four equal sides",
    }
    assert registry.described("shapes") == "circle: no sides at all; square: four equal sides"


def test_files_that_begin_with_an_underscore_are_no_names(package: Path) -> None:
    write(package, "__init__.py", '"""Shapes."""\n')
    write(package, "_corners.py", '"""What some share."""\n')
    write(package, "square.py", '"""Four equal sides."""\n')
    assert list(registry.registered("shapes")) == ["square"]

from pathlib import Path

import pytest

from dbllm_cli.errors import ConfigError
from dbllm_cli.pipeline.yaml_file import parse, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        ("-3", -3),
        ("010", 10),
        (".5", 0.5),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("10:20", "10:20"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("", None),
        ("~", None),
        ("'40'", "40"),
        ("[1, two]", [1, "two"]),
    ],
)
def test_scalars_are_read_as_they_look(text: str, value: object) -> None:
    found = parse(text)
    assert found == value
    assert type(found) is type(value)


def test_every_part_knows_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: 1\nb:\n  c:\n    - 1\n    - 2\n")
    document = read_yaml(file)
    assert document.value == {"a": 1, "b": {"c": [1, 2]}}
    assert [document.lines[place] for place in (("a",), ("b", "c"), ("b", "c", 1))] == [1, 3, 5]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "the key a stands twice here; it is also on line 1"),
        ("a: [1\nb: 2\n", 2, "can't be read"),
        ("a: &x 1\nb: *x\n", 2, "alias (*) is not supported"),
        ("a: *x\n", 1, "alias"),
        ("a: 1\nb: !!int one\n", 2, "'one' is no value of the tag"),
        ("a: !!float x\n", 1, "'x' is no value of the tag"),
        ("a: !!null x\n", 1, "'x' is no value of the tag"),
        ("a: !!bool yes\n", 1, "'yes' is no value of the tag"),
        ("a: !!binary aGk=\n", 1, "no value of the tag"),
        ("a: !own b\n", 1, "no value of the tag !own"),
        ("a: !!set {b}\n", 1, "set is not supported"),
        ("a: 1\n? [b]\n: 2\n", 2, "a key must be a plain text"),
    ],
)
def test_a_problem_shows_file_line_and_text(
    tmp_path: Path, text: str, line: int, problem: str
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    message = caught.value.message
    assert message.startswith(f"{file}:{line}: ")
    assert problem in message
    assert message.endswith(f"{line} | {text.splitlines()[line - 1]}")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: " + "9" * 5000, "no value of the tag"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("".join(" " * depth + "b:\n" for depth in range(1200)), "nested too deeply"),
        (" " * 1_000_001, "larger than 1,000,000 bytes"),
    ],
    ids=["digits", "brackets", "indents", "blanks"],
)
def test_what_is_too_much_for_a_pipeline_file_is_told_shortly(
    tmp_path: Path, text: str, problem: str
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_yaml(file)
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("text", "value"), [("!!str 40", "40"), ("!!int 7", 7), ("!!float 1", 1.0), ("!!null ''", None)]
)
def test_a_tag_that_fits_is_taken(text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "/dev/zero"])
def test_a_pipeline_file_that_can_t_be_one_is_told(name: str) -> None:
    with pytest.raises(ConfigError, match="can't be read: "):
        read_yaml(Path(name))


def test_a_pipeline_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file") as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "dbllm run" in caught.value.hint
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "x.yaml")

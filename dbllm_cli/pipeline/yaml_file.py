"""YAML as values that know their lines. Stricter than YAML 1.1: nothing is read by surprise."""

import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dbllm_cli.errors import ConfigError

Place = tuple[str | int, ...]

_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "tag:yaml.org,2002:null": (r"null|Null|NULL|~|", [*"nN~", ""]),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", [*"-+0123456789"]),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
}
_TEXT = "tag:yaml.org,2002:str"
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_LARGEST = 1_000_000
"""Bytes of a file: the largest that we ship has 10,000."""
_MOST_DIGITS = 100
_SHOWN = 200
"""Most characters of a line in an error."""
_SYNTAX_HINT = "check the brackets, colons and indentation here and on the line before"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `1e-4` is a number, `no` a string, `10:20` not a time of day."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases, so that every value stands where it is used."""
        if self.check_event(yaml.AliasEvent):
            problem = "an alias (*) is not supported: write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _starts) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _starts)


@dataclass
class Document:
    """A YAML file's content and where each part of it stands.

    Attributes:
        path: the file.
        value: mappings, lists and scalars.
        lines: the line of each part, by the keys that lead to it; from 1.
        overrides: the parts set on the command line, and the text that set them.
        text: the file's lines.
    """

    path: Path
    value: Any
    lines: dict[Place, int]
    overrides: dict[Place, str]
    text: list[str]

    def error(self, place: Place, problem: str, hint: str = "") -> ConfigError:
        """The error for the part at `place`, with its file, line and the line's text."""
        while place and place not in self.lines and place not in self.overrides:
            place = place[:-1]
        if place in self.overrides:
            return ConfigError(f"--set {self.overrides[place]}: {problem}", hint)
        line = self.lines.get(place, 1)
        shown = self.text[line - 1].strip()[:_SHOWN] if line <= len(self.text) else ""
        return ConfigError(f"{self.path}:{line}: {problem}\n  {line} | {shown}", hint)

    def set(self, place: Place, text: str, *, as_text: bool) -> None:
        """Put the value of an override `KEY=VALUE` in place of what the file says there.

        Args:
            place: the part.
            text: the override.
            as_text: the value is a text as it stands, whatever YAML would read in it, or null.
        """
        self.overrides[place] = text
        given = text.partition("=")[2]
        try:
            value = given if as_text and given != "null" else parse(given)
        except (yaml.YAMLError, _DuplicateKeyError) as error:
            problem = f"the value can't be read: {_reason(error)}"
            raise self.error(place, problem, "put the value in quotes") from error
        target = self.value
        for key in place[:-1]:
            target[key] = target.get(key) or {}
            target = target[key]
        target[place[-1]] = value


class _DuplicateKeyError(Exception):
    """A key stands twice in one mapping."""


def read_yaml(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        ConfigError: it can't be read, is not YAML, or has a duplicate key or an alias.
    """
    try:
        text = _read(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{path} can't be read: {reason}",
            "name a pipeline file, e.g. `dbllm run pipelines/quickstart.yaml`",
        ) from error
    document = Document(path, None, {}, {}, text.splitlines())
    try:
        document.value = parse(text, document.lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.lines[()] = mark.line + 1 if mark else 1
        raise document.error((), f"this can't be read: {_reason(error)}", _SYNTAX_HINT) from error
    except yaml.YAMLError as error:
        raise document.error((), f"this can't be read: {error}", _SYNTAX_HINT) from error
    except _DuplicateKeyError as error:
        place, first = error.args
        raise document.error(
            place,
            f"the key {place[-1]} stands twice here; it is also on line {first}",
            "keep one of the two",
        ) from error
    return document


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error


def parse(text: str, lines: dict[Place, int] | None = None) -> Any:
    """The value of a YAML text; fills `lines` when it is given."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(node, (), {} if lines is None else lines)
    except RecursionError as error:
        raise yaml.MarkedYAMLError(
            problem="it is nested too deeply", problem_mark=loader.get_mark()
        ) from error
    finally:
        loader.dispose()


def _value(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if node.tag not in _COLLECTIONS:
        raise _unreadable(node, f"the tag {node.tag} is not supported")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _unreadable(key_node, "a key must be a plain text")
            key = str(key_node.value)
            inner = (*place, key)
            if key in mapping:
                first = lines[inner]
                lines[inner] = key_node.start_mark.line + 1
                raise _DuplicateKeyError(inner, first)
            lines[inner] = key_node.start_mark.line + 1
            mapping[key] = _value(value_node, inner, lines)
        return mapping
    return [_value(item, (*place, n), lines) for n, item in enumerate(node.value)]


def _scalar(node: yaml.ScalarNode) -> Any:
    text = str(node.value)
    if node.tag == _TEXT:
        return text
    # A tag that is written out may not fit what it stands before.
    pattern = _SCALARS.get(node.tag, ("", []))[0]
    if not re.fullmatch(pattern, text) or len(text) > _MOST_DIGITS:
        raise _unreadable(node, f"{reprlib.repr(text)} is no value of the tag {node.tag}")
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case _:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _unreadable(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _reason(error: Exception) -> str:
    problem = getattr(error, "problem", None)
    return str(problem or error)

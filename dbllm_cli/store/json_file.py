"""JSON files: written the same for the same data, and read with bounds, for others wrote them."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dbllm_cli.errors import ArtifactCorruptError

COPY_AGAIN = "copy or download the file again"

# An index of a million tensors fits; what is larger is no such file.
_MOST_BYTES = 128 * 2**20
_MOST_LEVELS = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


def write_json(path: Path, data: object, *, finite: bool = True) -> None:
    """Write JSON that is the same for the same data.

    Args:
        path: the file.
        data: what it shall hold.
        finite: refuse NaN and infinity; the config.json of some models has them.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(data, indent=2, sort_keys=True, allow_nan=not finite)
    path.write_text(text + "\n")


def read_json(path: Path, hint: str = COPY_AGAIN, most_bytes: int = _MOST_BYTES) -> Any:
    """The content of a JSON file that anybody may have written.

    Args:
        path: the file.
        hint: the way out, for the error.
        most_bytes: a larger file is not read.

    Raises:
        ArtifactCorruptError: it is not there or no plain file, too large, or not JSON in UTF-8
            that every part of the program can carry.
    """
    try:
        # A config.json may hold Infinity.
        return parse_json(read_bytes(path, most_bytes), finite=False)
    except (OSError, ValueError) as error:
        raise ArtifactCorruptError(f"{path} can't be read as JSON: {error}", hint) from error


def read_json_object(path: Path, hint: str = COPY_AGAIN) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        ArtifactCorruptError: as `read_json`, or it holds something else.
    """
    value = read_json(path, hint)
    if not isinstance(value, dict):
        raise ArtifactCorruptError(f"{path} is not a JSON object", hint)
    return value


def read_bytes(path: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """The bytes of a plain file of bounded size.

    Raises:
        OSError: it can't be read.
        ValueError: it is no plain file, or larger.
    """
    size = path.stat().st_size
    # Opening a FIFO would wait for a writer.
    if not path.is_file():
        raise ValueError("it is not a plain file")
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes; at most {most_bytes:,} are read")
    return path.read_bytes()


def parse_json(data: bytes, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        data: the text in UTF-8.
        finite: refuse NaN and infinity, which Python reads though they are not JSON.

    Raises:
        ValueError: it is not JSON in UTF-8, is nested too deep, or holds half a character.
    """
    try:
        value = json.loads(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level: list[Any] = [value]
    for _ in range(_MOST_LEVELS):
        if any(isinstance(each, str) and _SURROGATE.search(each) for each in level):
            raise ValueError("it holds half of a surrogate pair")
        if finite and any(isinstance(each, float) and not math.isfinite(each) for each in level):
            raise ValueError("it holds a number that is not finite")
        level = [part for each in level for part in _parts(each)]
        if not level:
            return value
    raise ValueError("it is nested too deep")


def _parts(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return value if isinstance(value, list) else ()

"""Names that are files: what a folder of the package holds, told without importing it.

A level scheme is a file of `fdb/schemes`, a format one of `formats`. The first line of a file is
its line in `--help`.
"""

import ast
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent


@cache
def registered(folder: str) -> dict[str, str]:
    """The names in a folder of the package, sorted, and what each is.

    Args:
        folder: path below the package, e.g. `formats`.
    """
    files = sorted(path for path in (_PACKAGE / folder).glob("*.py") if path.stem[0] != "_")
    return {path.stem: _first_line(path) for path in files}


def described(folder: str) -> str:
    """The names in a folder with what each is, for a setting's description."""
    return "; ".join(f"{name}: {line}" for name, line in registered(folder).items())


def declared(folder: str, constant: str) -> dict[str, tuple[str, ...]]:
    """What a constant at the top of every file in a folder is, by name of the file.

    Args:
        folder: path below the package.
        constant: name of a literal tuple of strings, in each of the files.
    """
    files = {name: _PACKAGE / folder / f"{name}.py" for name in registered(folder)}
    return {name: _literal(path, constant) for name, path in files.items()}


def _literal(path: Path, constant: str) -> tuple[str, ...]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == constant:
            found: tuple[str, ...] = ast.literal_eval(node.value)
            return found
    raise LookupError(f"{path} has no {constant}")


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = text.splitlines()[0].removesuffix(".")
    return first[:1].lower() + first[1:]

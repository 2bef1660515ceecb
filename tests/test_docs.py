"""docs/architecture.md names what is there."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "dbllm_cli"
TEXT = (REPOSITORY / "docs" / "architecture.md").read_text()


def test_the_map_names_every_package_and_module_at_the_top() -> None:
    top = {path for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    names = {
        path.name + ("/" if path.is_dir() else "")
        for path in top
        if path.name not in ("__init__.py", "__pycache__")
    }
    tree = TEXT.split("```")[1]
    assert {name for name in names if name not in tree} - {"app.py"} == set()
    assert "app.py" in tree


def test_every_path_it_names_is_there() -> None:
    named = re.findall(r"`((?:[a-z]+/)+[a-z_]*(?:\.(?:py|h|json))?)`", TEXT)
    assert named
    for name in named:
        roots = (PACKAGE, REPOSITORY)
        assert any((root / name).exists() for root in roots) or "NAME" in name, name

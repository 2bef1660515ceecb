"""JSON files that are the same for the same data."""

import json
from pathlib import Path


def write_json(path: Path, data: object) -> None:
    """Write JSON that is the same for the same data; NaN is refused."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")

"""One input or output of a stage: where it is, what it is, and the digest of its content."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Artifact:
    """A finished artifact of the store, or a model from outside it.

    Attributes:
        path: its folder (a `.gguf` model: the file).
        kind: model, calibration, fdb, packed, eval or bench.
        digest: hex sha256 of its content.
        manifest: the content of its manifest.json; empty for a model from outside.
    """

    path: Path
    kind: str
    digest: str
    manifest: dict[str, Any]

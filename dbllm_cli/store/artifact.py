"""One input or output of a stage: where it is, what it is, and the digest of its content."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dbllm_cli.store.manifest import Manifest, typed_manifest


@dataclass(frozen=True)
class Artifact:
    """A finished artifact of the store, or a model from outside it.

    Attributes:
        path: its folder (a `.gguf` model: the file).
        kind: model, calibration, fdb, packed, eval or bench.
        digest: hex sha256 of its content.
        manifest: the content of its manifest.json, as it stands there; of a model from outside
            what it was called.
    """

    path: Path
    kind: str
    digest: str
    manifest: dict[str, Any]

    @cached_property
    def record(self) -> Manifest:
        """The manifest with its types.

        Raises:
            ArtifactCorruptError: it has none, as models from outside, or one of another shape.
        """
        return typed_manifest(self.path, self.manifest)

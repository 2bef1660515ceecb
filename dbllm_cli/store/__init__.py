"""Immutable, verified outputs on disk, and the models that come from outside."""

from dbllm_cli.store.artifact import Artifact
from dbllm_cli.store.digest import canonical_json, digest_of, file_sha256, files_digest
from dbllm_cli.store.manifest import lineage_key
from dbllm_cli.store.models import resolve_input, resolve_model
from dbllm_cli.store.staging import new_staging
from dbllm_cli.store.store import DamagedArtifact, Store

__all__ = [
    "Artifact",
    "DamagedArtifact",
    "Store",
    "canonical_json",
    "digest_of",
    "file_sha256",
    "files_digest",
    "lineage_key",
    "new_staging",
    "resolve_input",
    "resolve_model",
]

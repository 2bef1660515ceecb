"""Immutable, verified outputs on disk, and the models that come from outside."""

from dbllm_cli.store.artifact import Artifact
from dbllm_cli.store.digest import canonical_json, digest_of, file_sha256, files_digest
from dbllm_cli.store.integrity import read_object
from dbllm_cli.store.manifest import LineageRecord, lineage_key
from dbllm_cli.store.models import resolve_input, resolve_model
from dbllm_cli.store.staging import new_staging
from dbllm_cli.store.store import DamagedArtifact, Store

__all__ = [
    "Artifact",
    "DamagedArtifact",
    "LineageRecord",
    "Store",
    "canonical_json",
    "digest_of",
    "file_sha256",
    "files_digest",
    "lineage_key",
    "new_staging",
    "read_object",
    "resolve_input",
    "resolve_model",
]

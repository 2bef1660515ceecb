"""What the folder of a model from outside must hold, and what it must not be."""

import stat
from pathlib import Path

from dbllm_cli.errors import ArtifactCorruptError, ArtifactMissingError
from dbllm_cli.store.json_file import COPY_AGAIN, read_json_object
from dbllm_cli.store.manifest import MANIFEST
from dbllm_cli.store.weight_index import index_name, read_weight_map

SUFFIXES = (".safetensors", ".json", ".jinja", ".py", ".model", ".txt", ".tiktoken")
"""Of the files that make a model what it is: its digest is theirs."""
MODEL_FORMS = "a folder, a .gguf file, a hub id OWNER/NAME or builtin:smollm2-135m"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def model_files(folder: Path) -> list[Path]:
    """The files that the digest of a model is made from."""
    return [path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES]


def require_model(folder: Path) -> None:
    """Refuse a folder that is not a whole full-precision model.

    Raises:
        ArtifactMissingError: it was made by dbllm, is quantized, or lacks a file.
        ArtifactCorruptError: one of its JSON files is damaged.
    """
    _refuse_our_own(folder)
    _refuse_quantized(folder)
    require_whole_folder(folder)


def require_whole_folder(folder: Path) -> None:
    """Refuse a model, packed or not, that lacks a file.

    Raises:
        ArtifactMissingError: names the file.
        ArtifactCorruptError: the index is damaged, or a file is a folder or no plain file.
    """
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ArtifactMissingError(
            f"model {folder} has its weights in .bin files; dbllm reads only safetensors",
            "convert it: load it with transformers and call "
            "`model.save_pretrained(NEW_FOLDER)` and `tokenizer.save_pretrained(NEW_FOLDER)`",
        )
    lacking = what_is_lacking(folder)
    if lacking is not None:
        raise ArtifactMissingError(
            f"model {folder} {lacking}",
            "give the whole folder that save_pretrained wrote, or download or copy it again",
        )


def what_is_lacking(folder: Path) -> str | None:
    """What of a model's files is not there; None when it is whole.

    Raises:
        ArtifactCorruptError: the index is damaged, or a file is a folder or no plain file.
    """
    index = folder / index_name()
    if not _is_there(folder / _CONFIG):
        return "has no config.json"
    if not any(folder.glob("*.safetensors")):
        return "has no weights: no *.safetensors file"
    has_index = _is_there(index)
    if not has_index and not _is_there(folder / _WEIGHTS):
        shard = next(iter(sorted(folder.glob("*-of-*.safetensors"))), None)
        return None if shard is None else f"lacks {index.name}, which tells what {shard.name} holds"
    named = sorted(set(read_weight_map(index).values())) if has_index else []
    missing = [name for name in named if not _is_there(folder / name)]
    return f"lacks {', '.join(missing)}, which its {index.name} names" if missing else None


def is_artifact(folder: Path) -> bool:
    """Whether a folder is one of ours, damaged or not: other tools write a manifest.json too."""
    manifest = folder / MANIFEST
    try:
        content = read_json_object(manifest) if _is_there(manifest) else None
    except ArtifactCorruptError:
        return is_packed(folder)
    return content is not None and ("lineage" in content or is_packed(folder))


def is_packed(folder: Path) -> bool:
    """Whether a folder holds planes and scales, made here or elsewhere."""
    return _quantization(folder).get("quant_method") == "dbllm"


def _is_there(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ArtifactCorruptError(f"{path} can't be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ArtifactCorruptError(f"{path} is not a plain file", COPY_AGAIN)
    return True


def _refuse_our_own(folder: Path) -> None:
    kind = None
    if is_artifact(folder):
        kind = read_json_object(folder / MANIFEST).get("kind")
    elif is_packed(folder):
        kind = "packed"
    if kind is not None:
        raise ArtifactMissingError(
            f"{folder} is of kind {kind}, made by dbllm; a full-precision model is needed here",
            f"name {MODEL_FORMS}",
        )


def _refuse_quantized(folder: Path) -> None:
    quantization = _quantization(folder)
    if quantization:
        raise ArtifactMissingError(
            f"model {folder} is already quantized by {quantization.get('quant_method')}",
            "give the full-precision model that it was made from",
        )


def _quantization(folder: Path) -> dict[str, object]:
    if not _is_there(folder / _CONFIG):
        return {}
    settings = read_json_object(folder / _CONFIG).get("quantization_config")
    return settings if isinstance(settings, dict) else {}

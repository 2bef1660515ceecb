"""The index of a model in shards: which file holds each tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dbllm_cli.errors import ArtifactCorruptError
from dbllm_cli.store.json_file import COPY_AGAIN, read_json


def index_name(stem: str = "model") -> str:
    """The name of the index of `<stem>-00001-of-….safetensors`."""
    return f"{stem}.safetensors.index.json"


def read_weight_map(index: Path) -> Mapping[str, str]:
    """Name of each tensor -> name of its file, which lies beside the index.

    Raises:
        ArtifactCorruptError: it is no such index, or a file would lie elsewhere.
    """
    try:
        return _Index.model_validate(read_json(index)).weight_map
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactCorruptError(
            f"{index} is not an index of shards: {where}: {first['msg']}", COPY_AGAIN
        ) from error


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{name!r} is not the name of a file in its folder")
    return name


class _Index(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    weight_map: dict[str, Annotated[str, AfterValidator(_plain_name)]] = Field(min_length=1)

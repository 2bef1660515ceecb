"""What the settings of every stage are made of."""

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ComputeDtype = Literal["bfloat16", "float32"]
ComputeDtypeOrAuto = Literal["auto", ComputeDtype]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="seed of everything drawn at random")]
InputFile = Annotated[str, Field(json_schema_extra={"file": True})]

COMPUTE = "dtype of the products"
COMPUTE_OR_AUTO = COMPUTE + "; auto: bfloat16 where the device is faster in it, else float32"


class StageConfig(BaseModel):
    """Base of every stage's settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def require_inputs(self, given: Collection[str]) -> None:
        """Refuse settings that don't fit the inputs given, before anything runs.

        Args:
            given: the names of the slots that are filled.

        Raises:
            ConfigError: a setting needs an input, or has no effect beside one.
        """


class TextConfig(StageConfig):
    """Where text comes from: shared by the stages that read text."""

    text: InputFile | None = Field(
        None, description="text, JSONL or parquet file, or a folder of them"
    )
    dataset: str | None = Field(
        None, description="name of a dataset on the hub, NAME or NAME:CONFIG"
    )
    revision: str | None = Field(None, description="commit of the dataset; required with dataset")
    split: str = Field("train", description="split of the dataset")
    text_field: str = Field(
        "text", description="column of JSONL, parquet and datasets with the text"
    )
    documents: str | None = Field(
        None, pattern=r"^\d*:\d*$", description="range START:STOP of the documents to read"
    )
    separator: str | None = Field(
        None, min_length=1, description="string that splits a text file into documents"
    )

    def text_settings(self) -> dict[str, Any]:
        """The settings that say where text comes from, as `llm.text.TextSource` takes them."""
        return self.model_dump(include=set(TextConfig.model_fields))

    @model_validator(mode="after")
    def _dataset_is_pinned(self) -> "TextConfig":
        if self.text is not None and self.dataset is not None:
            raise ValueError("give text or dataset, not both")
        if self.dataset is not None and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                "a dataset needs as revision the 40 digits of a commit (a branch moves), so that "
                "the run can be repeated: huggingface.co/datasets/NAME/commits/main lists them"
            )
        return self

"""What the settings of every stage are made of."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

ComputeDtype = Literal["bfloat16", "float32"]
ComputeDtypeOrAuto = Literal["auto", ComputeDtype]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="seed of everything drawn at random")]
InputFile = Annotated[str, Field(json_schema_extra={"file": True})]

COMPUTE = "dtype of the products"
COMPUTE_OR_AUTO = COMPUTE + "; auto: bfloat16 where the device is faster in it, else float32"

# Far above what any run needs: beyond these a number is a slip, and the run would never end.
MOST = 1_000_000
"""Largest number of sequences, steps, windows or items."""
LARGEST_BATCH = 65_536
LONGEST = 1_048_576
"""Most tokens of a sequence."""
STRONGEST = 1000.0
"""Largest rate, weight or exponent."""
LONGEST_TEXT = 4096
"""Most characters of a text: no system has longer paths."""

SPLIT = "split of the dataset"
NO_EFFECT = "no_effect"
"""pydantic's type of the error for a setting that does nothing."""


class Needs:
    """Marks a setting that has no effect unless another one has one of these values.

    `Needs(loss="dad")`: loss must be dad. `Needs(text=..., dataset=...)`: one of the two must
    differ from its default. A setting with several marks needs them all.

    Args:
        settings: the values by setting, one or a tuple; `...` is any but the default.
    """

    def __init__(self, **settings: object) -> None:
        self._settings: Mapping[str, tuple[object, ...]] = {
            name: values if isinstance(values, tuple) else (values,)
            for name, values in settings.items()
        }

    def met(self, config: "StageConfig") -> bool:
        """Whether a setting with this mark has an effect."""
        changed = config.changed()
        return any(
            name in changed if values == (...,) else getattr(config, name) in values
            for name, values in self._settings.items()
        )

    def text(self, name: Callable[[str], str] = str) -> str:
        """What is needed, for people; `name` says how they write a setting."""
        return " or ".join(
            name(setting)
            if values == (...,)
            else f"{name(setting)} {' or '.join(map(str, values))}"
            for setting, values in self._settings.items()
        )

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The field's schema for editors, with what it needs as a comment."""
        schema = handler(core)
        comments = [schema["$comment"]] if "$comment" in schema else []
        return {**schema, "$comment": "; ".join([*comments, f"needs {self.text()}"])}


class StageConfig(BaseModel):
    """Base of every stage's settings: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        str_min_length=1,
        str_max_length=LONGEST_TEXT,
    )

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their default, as JSON has them."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def require_inputs(self, given: Collection[str]) -> None:
        """Refuse settings that don't fit the inputs given, before anything runs.

        Args:
            given: the names of the slots that are filled.

        Raises:
            ConfigError: a setting needs an input, or has no effect beside one.
        """

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        for setting in self.changed():
            for mark in type(self).model_fields[setting].metadata:
                if isinstance(mark, Needs) and not mark.met(self):
                    raise PydanticCustomError(
                        NO_EFFECT,
                        "{setting} has no effect: it needs {needs}",
                        {"setting": setting, "needs": mark.text(), "mark": mark},
                    )
        return self


class TextConfig(StageConfig):
    """Where text comes from: shared by the stages that read text."""

    text: InputFile | None = Field(
        None, description="text, JSONL or parquet file, or a folder of them"
    )
    dataset: str | None = Field(
        None, description="name of a dataset on the hub, NAME or NAME:CONFIG"
    )
    revision: Annotated[str | None, Needs(dataset=...)] = Field(
        None, description="commit of the dataset; required with dataset"
    )
    split: Annotated[str, Needs(dataset=...)] = Field("train", description=SPLIT)
    text_field: Annotated[str, Needs(text=..., dataset=...)] = Field(
        "text", description="column of JSONL, parquet and datasets with the text"
    )
    documents: Annotated[str | None, Needs(text=..., dataset=...)] = Field(
        None,
        pattern=r"^[0-9]{0,12}:[0-9]{0,12}$",
        description="range START:STOP of the documents to read",
    )
    separator: Annotated[str | None, Needs(text=...)] = Field(
        None, description="string that splits a text file into documents"
    )

    def text_settings(self) -> dict[str, Any]:
        """The settings that say where text comes from, as `llm.text.TextSource` takes them."""
        return self.model_dump(include=set(TextConfig.model_fields))

    @model_validator(mode="after")
    def _dataset_is_pinned(self) -> Self:
        if self.text is not None and self.dataset is not None:
            raise ValueError("give text or dataset, not both")
        if self.dataset is not None and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                "a dataset needs as revision the 40 digits of a commit (a branch moves), so that "
                "the run can be repeated: huggingface.co/datasets/NAME/commits/main lists them"
            )
        return self

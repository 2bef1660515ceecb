"""What `pack` writes: one file a format, named after it, whose first line says what it is.

`registry` finds the names without importing torch; each file holds one `FORMAT`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor

from dbllm_cli.llm.quantized_folder import PackedFolder

JsonObject = dict[str, Any]


class Format(ABC):
    """How a quantized model is written as a model folder.

    Attributes:
        imports: lines of Python that a reader runs before it opens the folder.
        tags: of the model card.
        rounded: what was rounded since the quantized model was evaluated; None: nothing.
    """

    imports: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, ...]]
    rounded: ClassVar[str | None] = None

    @abstractmethod
    def tensors(
        self, student: PackedFolder, trust_remote_code: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every tensor of the folder.

        Args:
            student: the quantized model.
            trust_remote_code: let transformers run code that comes with the model.
        """

    @abstractmethod
    def config(self, config: JsonObject) -> JsonObject:
        """config.json of the folder, from the quantized model's."""

    @abstractmethod
    def title(self, bits: float) -> str:
        """What the model card calls the model.

        Args:
            bits: of a quantized weight.
        """


def open_format(name: str) -> Format:
    """The format of this name."""
    chosen: Format = import_module(f"{__name__}.{name}").FORMAT
    return chosen

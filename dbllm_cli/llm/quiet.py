"""Keeping transformers off the screen, where dbllm draws its own progress."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no advice of transformers while open; its settings are then as they were."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hook = transformers_logging.set_tqdm_hook(_no_bar)
    # The reader of GGUF draws its bar past that hook.
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        transformers_logging.set_tqdm_hook(hook)
        transformers_logging.set_verbosity(verbosity)


def _no_bar(_factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return transformers_logging.EmptyTqdm(*args, **options)

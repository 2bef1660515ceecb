"""transformers is quiet while dbllm loads, and as the user had it before and after."""

from collections.abc import Iterator

import pytest
from huggingface_hub import utils as hub
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from dbllm_cli.llm.quiet import quiet_transformers


@pytest.fixture(params=[True, False])
def enabled(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the user has switched the bars on."""
    before = transformers_logging.is_progress_bar_enabled()
    switch(request.param)
    yield request.param
    switch(before)


def switch(on: bool) -> None:
    if on:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()


def test_bars_and_verbosity_are_as_they_were(enabled: bool) -> None:
    verbosity = transformers_logging.get_verbosity()
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    with quiet_transformers(), quiet_transformers():
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
    assert transformers_logging.get_verbosity() == verbosity
    assert transformers_logging.is_progress_bar_enabled() == enabled
    assert hub.are_progress_bars_disabled() != enabled
    assert modeling_gguf_pytorch_utils.tqdm is gguf_bar


def test_no_bar_is_drawn_not_even_that_of_the_reader_of_gguf(
    enabled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    del enabled
    with quiet_transformers():
        assert list(transformers_logging.tqdm([1, 2], desc="Loading weights")) == [1, 2]
        assert list(modeling_gguf_pytorch_utils.tqdm([1, 2], desc="Converting")) == [1, 2]
    assert capsys.readouterr().err == ""
    if transformers_logging.is_progress_bar_enabled():
        list(transformers_logging.tqdm([1, 2], desc="Loading weights"))
        assert "Loading weights" in capsys.readouterr().err

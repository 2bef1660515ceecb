"""The tiny models of the tests of `llm`."""

from tests.llm.conftest import _one_thread, ids, llama, task

__all__ = ["_one_thread", "ids", "llama", "task"]

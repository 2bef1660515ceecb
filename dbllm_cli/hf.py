"""`import dbllm_cli.hf` lets transformers load packed models with from_pretrained."""

from dbllm_cli.llm.quantizer import DbllmConfig, DbllmQuantizer, register

register()

__all__ = ["DbllmConfig", "DbllmQuantizer"]

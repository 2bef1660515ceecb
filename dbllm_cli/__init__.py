"""dbllm: 2-bit language models by the DB-LLM method."""

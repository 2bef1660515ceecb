"""Everything that touches transformers, datasets and gguf: models, text, generation, perplexity."""

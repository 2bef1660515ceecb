"""From a stage's text settings to the text."""

from dbllm_cli.configs import TextConfig
from dbllm_cli.llm.text import TextSource


def text_source(config: TextConfig) -> TextSource:
    """Where the documents that `config` names come from."""
    return TextSource(**config.model_dump(include=set(TextConfig.model_fields)))

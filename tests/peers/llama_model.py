"""Times a GGUF model in llama.cpp: one prompt, then a token at a time.

    llama-venv/bin/python tests/peers/llama_model.py model.gguf --threads 2

runs under the Python that has llama-cpp-python, of which only the C functions are called. Settings
are llama.cpp's own defaults but for the threads, and a context and batches that hold all tokens.
With --serve it answers a round's figures to every line that gives a number of threads.
"""

import argparse
import ctypes
import json
import math
import random
import time
from pathlib import Path

from line_child import memory, serve_rounds
from llama_cpp import llama_cpp

WARM_PROMPT, WARM_DECODE = 8, 2


IGNORE_LOG = llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaModel:
    """A model and its context.

    Args:
        path: the GGUF file.
        tokens: of the longest sequence.
    """

    def __init__(self, path: Path, tokens: int) -> None:
        llama_cpp.llama_log_set(IGNORE_LOG, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise SystemExit(f"llama.cpp can't load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = tokens
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise SystemExit(f"llama.cpp can't make a context of {tokens} tokens")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )

    def time_round(self, threads: int, prompt: int, decode: int) -> dict[str, float]:
        """Seconds of the prefill and of the whole decode; a short round before wakes the threads.

        Args:
            threads: of both.
            prompt: tokens of the prompt.
            decode: tokens that follow one by one.
        """
        llama_cpp.llama_set_n_threads(self._context, threads, threads)
        self._run(min(prompt, WARM_PROMPT), min(decode, WARM_DECODE))
        return self._run(prompt, decode)

    def _run(self, prompt: int, decode: int) -> dict[str, float]:
        source = random.Random(0)  # noqa: S311
        tokens = [source.randrange(self._vocabulary) for _ in range(prompt + decode)]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        begin = time.perf_counter()
        self._decode(tokens[:prompt])
        middle = time.perf_counter()
        for token in tokens[prompt:]:
            self._decode([token])
        return {"prefill": middle - begin, "decode": time.perf_counter() - middle}

    def _decode(self, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        # A batch without marks gives the logits of its last token only.
        status = llama_cpp.llama_decode(
            self._context, llama_cpp.llama_batch_get_one(array, len(tokens))
        )
        llama_cpp.llama_synchronize(self._context)
        if status or not math.isfinite(llama_cpp.llama_get_logits_ith(self._context, -1)[0]):
            raise SystemExit(f"llama_decode gives {status}, or logits that are no numbers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    lengths = options.prompt_tokens, options.decode_tokens
    model = LlamaModel(options.model, sum(lengths))
    if options.serve:
        serve_rounds(lambda threads: model.time_round(threads, *lengths))
        return
    rounds = [model.time_round(options.threads, *lengths) for _ in range(options.repeats + 1)][1:]
    seconds = {name: [figures[name] for figures in rounds] for name in rounds[0]}
    print(
        json.dumps({"model": str(options.model), "threads": options.threads} | seconds | memory())
    )


if __name__ == "__main__":
    main()

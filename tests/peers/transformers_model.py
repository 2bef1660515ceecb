"""A dense or packed model folder in transformers, served to model_bench.py line by line.

Answers a round's figures, prefill and decode, to every line that gives a number of threads.
"""

import argparse
from pathlib import Path

import torch
from line_child import serve_rounds

from dbllm_cli.llm.decoding import prefill_and_decode
from dbllm_cli.llm.models import load_model

WARM_PROMPT, WARM_DECODE = 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=32)
    options = parser.parse_args()
    model = load_model(options.folder, torch.bfloat16)
    with torch.inference_mode():
        logits = model(torch.arange(WARM_PROMPT)[None], logits_to_keep=1).logits
    if not logits.isfinite().all():
        raise SystemExit(f"the logits of {options.folder} are no numbers")

    def time_round(threads: int) -> dict[str, float]:
        torch.set_num_threads(threads)
        # A short round before wakes the threads.
        prefill_and_decode(model, 1, WARM_PROMPT, WARM_DECODE, 0)
        prefill, decode = prefill_and_decode(
            model, 1, options.prompt_tokens, options.decode_tokens, 0
        )
        return {"prefill": prefill, "decode": decode}

    serve_rounds(time_round)


if __name__ == "__main__":
    main()

"""Where the time of one decoded token goes, in `model.generate` of transformers.

    python tests/peers/token_time.py artifacts/packed-… --threads 2
    python tests/peers/token_time.py artifacts/packed-… --threads 2 --separate

The operators of whole blocks, or with `--separate` every module's forward, the rotation of queries
and keys and the attention, are timed from outside while `generate` writes, and the cache too; what
is left is Python between them.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dbllm_cli.fdb.linear import FdbLinear
from dbllm_cli.kernels import PackedBlock
from dbllm_cli.llm.blocks import find_blocks
from dbllm_cli.llm.models import load_model
from dbllm_cli.llm.quantizer import register

WHOLE = "forward"


class Stopwatch:
    """Adds up the time spent in wrapped functions."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - begin
            self.calls[name] += 1
            return result

        return timed

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--separate", action="store_true", help="every module by itself")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    register()
    model = load_model(options.model, torch.bfloat16, "cpu", False)
    if options.separate:
        for layer in find_blocks(model).modules:
            vars(layer).pop("forward", None)
    prompt = torch.randint(1000, (1, options.prompt_tokens))
    plain = min(seconds_per_token(model, prompt, options.tokens) for _ in range(options.repeats))
    watch = Stopwatch()
    watch_blocks(watch)
    watch_modules(model, watch)
    best: tuple[float, Stopwatch] | None = None
    for _ in range(options.repeats):
        watch.clear()
        seconds = seconds_per_token(model, prompt, options.tokens, watch)
        if best is None or seconds < best[0]:
            best = seconds, Stopwatch()
            best[1].seconds.update(watch.seconds)
            best[1].calls.update(watch.calls)
    assert best is not None
    report(plain, *best, options.tokens - 1)


def watch_blocks(watch: Stopwatch) -> None:
    before, after = PackedBlock.before_cache, PackedBlock.after_cache
    PackedBlock.before_cache = watch.wrap(before, "blocks, before the cache")
    PackedBlock.after_cache = watch.wrap(after, "blocks, after the cache")


def watch_modules(model: GenerationMixin, watch: Stopwatch) -> None:
    fused = [layer for layer in find_blocks(model).modules if "forward" in vars(layer)]
    for module in model.modules():
        name = kind(module, model)
        # A hook or another forward inside a block would end its own operators.
        inside = any(module in layer.modules() for layer in fused)
        if name is not None and not inside:
            module.forward = watch.wrap(module.forward, name)
    model.forward = watch.wrap(model.forward, WHOLE)
    ours = sys.modules[type(model).__module__]
    if hasattr(ours, "apply_rotary_pos_emb"):
        ours.apply_rotary_pos_emb = watch.wrap(ours.apply_rotary_pos_emb, "rotation")
    own = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[own] = watch.wrap(ALL_ATTENTION_FUNCTIONS[own], "attention")
    DynamicCache.update = watch.wrap(DynamicCache.update, "cache")


def kind(module: torch.nn.Module, model: GenerationMixin) -> str | None:
    name = type(module).__name__
    if isinstance(module, FdbLinear):
        return "packed products"
    if module is model.get_output_embeddings():
        return "output layer"
    if "Norm" in name:
        return "norms"
    if any(module.children()):
        return None
    return "the rest of the modules"


def seconds_per_token(
    model: GenerationMixin, prompt: torch.Tensor, tokens: int, watch: Stopwatch | None = None
) -> float:
    """Of `generate`, without the prompt's own forward."""
    times: list[float] = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())
            if watch is not None and len(times) == 2:  # the prompt, then the first token
                watch.clear()

        def end(self) -> None: ...

    model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=Clock()
    )
    return (times[-1] - times[1]) / (tokens - 1)


def report(plain: float, timed: float, watch: Stopwatch, tokens: int) -> None:
    print(f"{plain * 1e3:.2f} ms a token ({1 / plain:.1f} tokens/s); {timed * 1e3:.2f} ms timed")
    forward = watch.seconds.pop(WHOLE) / tokens
    parts = {name: seconds / tokens for name, seconds in watch.seconds.most_common()}
    for name, share in parts.items():
        print(f"{name:28} {watch.calls[name] / tokens:5.0f} calls {share * 1e3:7.2f} ms")
    rest = {
        "the rest of forward: Python": forward - sum(parts.values()),
        "the rest of generate: Python": timed - forward,
    }
    for name, share in rest.items():
        print(f"{name:28} {'':11} {share * 1e3:7.2f} ms")


if __name__ == "__main__":
    main()

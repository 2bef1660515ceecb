"""Times a model dense, packed and in llama.cpp: prefill, decode and memory.

    python tests/peers/model_bench.py FOLDER --llama-cpp llama-venv/bin/python --threads 1 2

FOLDER holds what random_model.py writes: dense/, packed/ and model.gguf, each of which may be
missing. Every contender is a process of its own, all are loaded at once, and they take turns round
by round while the others sleep. The first round is dropped, one that other processes disturb is run
again; figures are medians. Peak memory is the most that a process has had resident (VmHWM), loading
and mapped files included. `disturbed` is the cores that others kept busy in the worst round.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from line_child import LineChild

DENSE, PACKED, LLAMA = "dense bfloat16, transformers", "packed, transformers", "GGUF, llama.cpp"
# Threads that wait for each other at barriers come to a standstill where others take a core.
TRIES, MOST_DISTURBED = 4, 0.05
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-cpp", type=Path, help="a Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lengths = options.prompt_tokens, options.decode_tokens
    commands = contenders(options.folder, options.llama_cpp, *lengths)
    if not commands:
        sys.exit(f"{options.folder} holds no model: see random_model.py")
    children: dict[str, LineChild] = {}
    try:
        for name, (command, _) in commands.items():
            children[name] = LineChild(command, {})
            children[name].receive()  # loaded
        rows: list[Row] = []
        for threads in options.threads:
            turns = take_turns(children, threads, options.repeats)
            for name, rounds in turns.items():
                row: Row = {"contender": name, "threads": threads, "disk": commands[name][1]}
                rows.append(row | figures(rounds, *lengths))
            if not options.json:
                print(table(rows, threads), flush=True)
        if options.json:
            print(json.dumps({"prompt": lengths[0], "decode": lengths[1], "rows": rows}))
    finally:
        for child in children.values():
            child.close()


def contenders(
    folder: Path, llama: Path | None, prompt: int, decode: int
) -> dict[str, tuple[list[str], int]]:
    """Command and weight bytes on disk of what there is."""
    lengths = ["--prompt-tokens", str(prompt), "--decode-tokens", str(decode)]
    found: dict[str, tuple[list[str], int]] = {}
    here = Path(__file__)
    for name, part in {DENSE: folder / "dense", PACKED: folder / "packed"}.items():
        weights = sum(file.stat().st_size for file in part.glob("*.safetensors"))
        if weights:
            script = str(here.with_name("transformers_model.py"))
            found[name] = [sys.executable, script, str(part), *lengths], weights
    gguf = folder / "model.gguf"
    if gguf.is_file() and llama is not None:
        script = str(here.with_name("llama_model.py"))
        found[LLAMA] = [str(llama), script, str(gguf), "--serve", *lengths], gguf.stat().st_size
    return found


def take_turns(
    children: dict[str, LineChild], threads: int, repeats: int
) -> dict[str, list[dict[str, float]]]:
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in children}
    for repeat in range(repeats + 1):
        for name, child in children.items():
            answer = child.ask(str(threads))
            for _ in range(TRIES):
                if not repeat or disturbed(answer) < MOST_DISTURBED:
                    break
                answer = child.ask(str(threads))
            if repeat:
                rounds[name].append(answer)
    return rounds


def disturbed(answer: dict[str, float]) -> float:
    """Cores that other processes kept busy during a round."""
    # The clock of the busy cores is coarse.
    return max(0.0, answer["others"] - 0.03) / (answer["prefill"] + answer["decode"])


def figures(rounds: list[dict[str, float]], prompt: int, decode: int) -> Row:
    seconds = {name: [answer[name] for answer in rounds] for name in ("prefill", "decode")}
    return {
        "prefill_seconds": seconds["prefill"],
        "decode_seconds": seconds["decode"],
        "prefill_tokens_per_second": prompt / statistics.median(seconds["prefill"]),
        "decode_tokens_per_second": decode / statistics.median(seconds["decode"]),
        "disturbed": max(map(disturbed, rounds)),
        **{name: rounds[-1][name] for name in ("peak", "resident", "anonymous")},
    }


def table(rows: list[Row], threads: int) -> str:
    """Markdown, with ratios to the dense model where there is one."""
    shown = [row for row in rows if row["threads"] == threads]
    heads = ["contender", "prefill tokens/s", "of dense", "decode tokens/s", "of dense",
             "peak memory", "weights on disk", "disturbed"]  # fmt: skip
    lines = [f"\nthreads: {threads}\n", f"| {' | '.join(heads)} |", "|---" + 7 * "|---:" + "|"]
    dense = next((row for row in shown if row["contender"] == DENSE), None)
    for row in shown:
        cells = [str(row["contender"])]
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            speed = number(row, name)
            ratio = "–" if dense is None else f"{speed / number(dense, name):.2f}×"
            cells += [f"{speed:.1f}" if speed < 1000 else f"{speed:.0f}", ratio]
        cells += [f"{number(row, name) / 1e9:.2f} GB" for name in ("peak", "disk")]
        cells.append(f"{number(row, 'disturbed'):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, int | float)
    return value


if __name__ == "__main__":
    main()

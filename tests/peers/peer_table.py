"""dbllm beside other quantizers: bits, perplexities, task accuracies, time and memory.

    python tests/peers/peer_table.py MODEL CALIBRATION WORK --ours artifacts/fdb-… \
        --peers autoround:64 gptqmodel:64 hqq:128 --text wiki.test.raw c4.parquet:1000:2000

MODEL is a folder with safetensors, CALIBRATION an artifact: every peer gets its sequences. Each is
installed into its own venv under WORK and run by peer_quantizer.py; what is there is not made anew.
All are evaluated by the same `dbllm eval-ppl` and, with the extra `eval`, `dbllm eval-tasks`. A
difference is to the first of `--ours`, in nats a token, with its paired standard error. Minutes are
of one core; ours are those of every stage from the calibration on.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dbllm_cli.stages.comparison import EvalResult, paired_difference
from dbllm_cli.store.artifact import Artifact

PACKAGES = {
    "autoround": "auto-round==0.16.1",
    "gptqmodel": "gptqmodel==7.6.0",
    "hqq": "hqq==0.2.8.post1",
}
COMMON = ("torch==2.13.0", "transformers==5.23.0", "safetensors", "accelerate")
SETTINGS = {"GPTQMODEL_CPU_WORKERS": "2"}
"""On two cores GPTQModel gives itself one worker and then asks for two."""
HERE = Path(__file__).parent
TASKS = "dbllm_lambada,dbllm_piqa,dbllm_arc_easy,dbllm_winogrande"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--ours", nargs="+", required=True, help="fdb or packed artifacts")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME:GROUP_SIZE")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE[:FIRST:LAST]")
    parser.add_argument("--max-windows", type=int, help="all when absent")
    parser.add_argument("--limit", type=int, default=500, help="items of each task; 0: no tasks")
    parser.add_argument("--compute-dtype", default="float32", help="of the evaluations")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows = {"teacher": {"path": options.model}}
    rows |= {
        Path(path).name: {"path": Path(path), **our_figures(Path(path))} for path in options.ours
    }
    for peer in options.peers:
        name, group_size = peer.split(":")
        try:
            path = quantized(name, int(group_size), options)
            rows[peer] = {"path": path, **json.loads((path / "peer.json").read_text())}
        except subprocess.CalledProcessError as error:
            print(f"{peer} failed: {error}", file=sys.stderr)
    for row in rows.values():
        row["perplexity"] = [evaluated(row["path"], text, options) for text in options.text]
        row["accuracy"] = accuracy(row["path"], options) if options.limit else {}
    print(table(rows, Path(options.ours[0]).name))


def quantized(name: str, group_size: int, options: argparse.Namespace) -> Path:
    """The peer's model folder, made where it is not there."""
    out: Path = options.work / f"{name}-g{group_size}"
    if (out / "peer.json").is_file():
        return out
    python = options.work / "venvs" / name / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *COMMON], check=True)
        subprocess.run([*install, PACKAGES[name]], check=True)
    tokens = options.calibration / "tokens.safetensors"
    command = [python, HERE / "peer_quantizer.py", name, options.model, tokens, out]
    command += ["--group-size", str(group_size), "--threads", str(options.threads)]
    with (options.work / f"{out.name}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, env=os.environ | SETTINGS)
    return out


def our_figures(path: Path) -> dict[str, float]:
    """Bits, seconds of one core and peak memory over the stages that made an artifact."""
    manifests = [json.loads(each.read_text()) for each in path.parent.glob("*/manifest.json")]
    by_digest = {manifest["digest"]: manifest for manifest in manifests}
    waiting = [json.loads((path / "manifest.json").read_text())["digest"]]
    made: dict[str, Any] = {}
    while waiting:
        digest = waiting.pop()
        if digest in by_digest and digest not in made:
            made[digest] = by_digest[digest]
            waiting += _digests(by_digest[digest]["lineage"]["inputs"])
    steps = [manifest["provenance"] for manifest in made.values()]
    metrics = json.loads((path / "metrics.json").read_text())
    # pack and the stages before it each have a name of their own for it.
    bits = metrics.get("bits_per_quantized_weight", metrics.get("bits_per_weight"))
    return {
        "bits": bits,
        "seconds": sum(step["seconds"] * step["threads"] for step in steps),
        "peak_gib": max(step["peak_memory_mib"] for step in steps) / 1024,
    }


def _digests(inputs: dict[str, str | list[str]]) -> list[str]:
    return [d for each in inputs.values() for d in ([each] if isinstance(each, str) else each)]


def evaluated(path: Path, text: str, options: argparse.Namespace) -> EvalResult:
    file, _, documents = text.partition(":")
    command = ["eval-ppl", str(path), "--text", file]
    command += ["--documents", documents] if documents else ["--reading", "raw"]
    command += ["--sequence-length", "1024", "--compute-dtype", options.compute_dtype]
    command += ["--max-windows", str(options.max_windows)] if options.max_windows else []
    return EvalResult.read(artifact(command, options))


def accuracy(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder = str(HERE.parent / "tasks")
    command = ["eval-tasks", str(path), "--tasks", TASKS, "--include-path", folder]
    command += ["--limit", str(options.limit), "--compute-dtype", options.compute_dtype]
    made = artifact(command, options)
    metrics: dict[str, Any] = json.loads((made.path / "metrics.json").read_text())
    return metrics


def artifact(command: list[str], options: argparse.Namespace) -> Artifact:
    """What a command of dbllm makes, or finds in the store."""
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    run = subprocess.run(
        ["dbllm", *command], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads
    )
    path = Path(run.stdout.strip())
    manifest = json.loads((path / "manifest.json").read_text())
    return Artifact(path, manifest["kind"], manifest["digest"], manifest)


def table(rows: dict[str, dict[str, Any]], ours: str) -> str:
    tasks = list(next(iter(rows.values()))["accuracy"].get("tasks", {}))
    texts = [result.what for result in rows[ours]["perplexity"]]
    heads = ["", "bits", *texts, *tasks, "mean", "minutes", "GiB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        cells = [name, f"{row['bits']:.2f}" if "bits" in row else ""]
        for result, base in zip(row["perplexity"], rows[ours]["perplexity"], strict=True):
            difference, error = paired_difference(result, base)
            apart = "" if name == ours else f" ({difference:+.3f} ± {error:.3f})"
            cells.append(f"{result.perplexity:.2f}{apart}")
        figures = row["accuracy"].get("tasks", {})
        cells += [spread(figures[task], "acc") for task in tasks]
        cells.append(spread(row["accuracy"], "mean_acc") if tasks else "")
        cells += [f"{row['seconds'] / 60:.1f}" if "seconds" in row else ""]
        cells += [f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(figures: dict[str, float], name: str) -> str:
    return f"{figures[name]:.3f} ± {figures[f'{name}_standard_error']:.3f}"


if __name__ == "__main__":
    main()

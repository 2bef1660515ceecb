"""Measures rows of the quantizers' table: perplexities, task accuracies, bits, time and memory.

    python tests/peers/peer_rows.py MODEL CALIBRATION ROWS --work WORK \
        --ours dbllm-g64=artifacts/packed-… --peers autoround:64 gptqmodel:64 hqq:64 \
        --text wiki.test.raw c4.parquet:1000:2000

MODEL is a folder with safetensors, CALIBRATION an artifact: every peer gets its sequences. Each is
installed into its own venv under WORK and run by peer_quantizer.py; what is there is not made anew.
All are evaluated by the same `dbllm eval-ppl` and, with the extra `eval`, `dbllm eval-tasks`. Each
row is written to ROWS/NAME.json with the loss of every window and the score of every item, so that
peer_table.py can pair it with rows of other days. Seconds are of the processor; ours are those of
every stage from the calibration on.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dbllm_cli.machine.processor import processor
from dbllm_cli.records.evaluation import EvalResult, TasksResult
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
    parser.add_argument("rows", type=Path, help="folder of the rows")
    parser.add_argument("--work", type=Path, required=True, help="folder of venvs and models")
    parser.add_argument("--teacher", action="store_true", help="a row of the model itself")
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=ARTIFACT")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME:GROUP_SIZE")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE[:FIRST:LAST]")
    parser.add_argument("--max-windows", type=int, help="all when absent")
    parser.add_argument("--limit", type=int, default=500, help="items of each task; 0: no tasks")
    parser.add_argument("--compute-dtype", default="float32", help="of the evaluations")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.teacher:
        measure("teacher", options.model, {}, options)
    for each in options.ours:
        name, _, path = each.partition("=")
        measure(name, Path(path), our_figures(Path(path)), options)
    for each in options.peers:
        peer, _, group_size = each.partition(":")
        name = f"{peer}-g{group_size}"
        try:
            path = quantized(peer, group_size, options.work / name, options)
        except subprocess.CalledProcessError as error:
            print(f"{name} failed: {error}, see {options.work / name}.log", file=sys.stderr)
            continue
        figures = json.loads((path / "peer.json").read_text())
        measure(name, path, figures | {"processor": processor()}, options)


def measure(name: str, path: Path, figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Evaluate a row and write it."""
    row = figures | {
        "perplexity": [asdict(evaluated(path, text, options)) for text in options.text],
        "tasks": asdict(accuracies(path, options)) if options.limit else None,
    }
    options.rows.mkdir(parents=True, exist_ok=True)
    (options.rows / f"{name}.json").write_text(json.dumps(row) + "\n")


def quantized(peer: str, group_size: str, out: Path, options: argparse.Namespace) -> Path:
    """The peer's model folder, made where it is not there."""
    if (out / "peer.json").is_file():
        return out
    python = options.work / "venvs" / peer / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *COMMON], check=True)
        subprocess.run([*install, PACKAGES[peer]], check=True)
    tokens = options.calibration / "tokens.safetensors"
    command = [python, HERE / "peer_quantizer.py", peer, options.model, tokens, out]
    command += ["--group-size", group_size, "--threads", str(options.threads)]
    with (options.work / f"{out.name}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, env=os.environ | SETTINGS)
    return out


def our_figures(path: Path) -> dict[str, Any]:
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
        "seconds": sum(step["processor_seconds"] for step in steps),
        "peak_gib": max(step["peak_memory_mib"] for step in steps) / 1024,
        "processor": steps[0]["processor"],
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


def accuracies(path: Path, options: argparse.Namespace) -> TasksResult:
    folder = str(HERE.parent / "tasks")
    command = ["eval-tasks", str(path), "--tasks", TASKS, "--include-path", folder]
    command += ["--limit", str(options.limit), "--compute-dtype", options.compute_dtype]
    return TasksResult.read(artifact(command, options))


def artifact(command: list[str], options: argparse.Namespace) -> Artifact:
    """What a command of dbllm makes, or finds in the store."""
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    run = subprocess.run(
        ["dbllm", *command], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads
    )
    path = Path(run.stdout.strip())
    manifest = json.loads((path / "manifest.json").read_text())
    return Artifact(path, manifest["kind"], manifest["digest"], manifest)


if __name__ == "__main__":
    main()

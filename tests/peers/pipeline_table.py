"""The table of a pipeline in Markdown: what every step that makes a model gives, and what it takes.

    python tests/peers/pipeline_table.py pipelines/smollm2-135m-ablation.yaml

Reads the store that `dbllm run PIPELINE` filled (DBLLM_STORE), as far as it came. Perplexities are
of the steps that evaluate the model, minutes of one core of the step alone, tokens those that the
step trained on, each as often as it was read.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

Steps = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline")
    options = parser.parse_args()
    steps = read_steps(options.pipeline)
    evaluations = [step for step in steps.values() if step["lineage"]["stage"] == "eval-ppl"]
    texts = list(dict.fromkeys(step["metrics"]["what"] for step in evaluations))
    print(row("step", "bits", *texts, "minutes", "tokens", "GiB"))
    print("|---" * (len(texts) + 5) + "|")
    teacher = next(iter(steps.values()))["lineage"]["inputs"]["model"]
    print(row("teacher", "", *perplexities(teacher, texts, evaluations), "", "", ""))
    for name, step in steps.items():
        if step["kind"] in ("fdb", "packed"):
            metrics = step["metrics"]
            of = "bits_per_quantized_weight" if step["kind"] == "packed" else "bits_per_weight"
            bits = f"{metrics[of]:.2f}"
            found = perplexities(step["digest"], texts, evaluations)
            print(row(name, bits, *found, *costs(step, steps)))


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def read_steps(pipeline: str) -> Steps:
    """Manifest and metrics of every step that the store holds, by name."""
    command = ["dbllm", "run", pipeline, "--dry-run", "--json"]
    plan = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    steps: Steps = {}
    for step in plan["steps"]:
        if step["action"] == "up to date":
            folder = Path(step["path"])
            manifest = json.loads((folder / "manifest.json").read_text())
            steps[step["step"]] = manifest | {
                "metrics": json.loads((folder / "metrics.json").read_text())
            }
    return steps


def perplexities(digest: str, texts: list[str], evaluations: list[dict[str, Any]]) -> list[str]:
    found = {
        step["metrics"]["what"]: f"{step['metrics']['perplexity']:,.2f}"
        for step in evaluations
        if step["lineage"]["inputs"]["model"] == digest
    }
    return [found.get(text, "") for text in texts]


def costs(step: dict[str, Any], steps: Steps) -> list[str]:
    provenance = step["provenance"]
    minutes = f"{provenance['processor_seconds'] / 60:.1f}"
    return [minutes, tokens(step, steps), f"{provenance['peak_memory_mib'] / 1024:.1f}"]


def tokens(step: dict[str, Any], steps: Steps) -> str:
    """What the step trained on; nothing for the steps that don't train."""
    config, stage = step["provenance"]["settings"], step["lineage"]["stage"]
    if stage not in ("reconstruct", "distill"):
        return ""
    read = step["lineage"]["inputs"]["calibration"]
    calibration = next(each for each in steps.values() if each["digest"] == read)
    length = calibration["provenance"]["settings"]["sequence_length"]
    samples = config["num_samples"] or calibration["metrics"]["tokens"] // length
    if stage == "reconstruct":
        return f"{samples * config['passes'] * length:,}"
    return f"{config['steps'] * config['batch_size'] * config['gradient_accumulation'] * length:,}"


if __name__ == "__main__":
    main()

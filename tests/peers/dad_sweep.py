"""Settles DAD by measurement: perplexity for every ambiguity and gamma, over seeds.

    python tests/peers/dad_sweep.py STUDENT MODEL CALIBRATION --text stories.txt \
        --eval "--protocol documents --separator <|endoftext|> --sequence-length 512" \
        --distill "--steps 100" --seeds 0 1 2

Gamma 0 is plain distillation, the control, and runs once a seed. Runs that the store holds are not
repeated, so that a sweep that was stopped goes on. Prints a Markdown table of means and, after ±,
the standard deviation over the seeds.
"""

import argparse
import json
import shlex
import statistics
import subprocess
from pathlib import Path

AMBIGUITIES = ("teacher", "student", "product", "cross")
GAMMAS = (0.1, 0.5, 1.0, 2.0)
Settings = tuple[str, float, float]
"""Ambiguity, gamma and lambda, the weight of the plain term."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="an fdb artifact")
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--text", type=Path, required=True, help="what perplexity is measured on")
    parser.add_argument("--eval", default="", help="further options of eval-ppl")
    parser.add_argument("--distill", default="", help="further options of distill")
    parser.add_argument("--ambiguities", nargs="+", default=AMBIGUITIES, choices=AMBIGUITIES)
    parser.add_argument("--gammas", type=float, nargs="+", default=GAMMAS)
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    grid: list[Settings] = [("teacher", 0.0, 0.0)]
    grid += [
        (ambiguity, gamma, plain)
        for plain in options.lambdas
        for ambiguity in options.ambiguities
        for gamma in options.gammas
    ]
    found: dict[Settings, list[float]] = {settings: [] for settings in grid}
    # Seed by seed, so that a sweep that is stopped has compared all of them.
    for seed in options.seeds:
        for settings in grid:
            found[settings].append(perplexity(options, settings, seed))
            print(seed, *settings, found[settings][-1], flush=True)
    print(table(found, options.lambdas, options.gammas, options.ambiguities))


def perplexity(options: argparse.Namespace, settings: Settings, seed: int) -> float:
    ambiguity, gamma, plain = settings
    loss = ["--loss", "dad", "--ambiguity", ambiguity, "--gamma", str(gamma)]
    loss += ["--plain-weight", str(plain), "--seed", str(seed), *shlex.split(options.distill)]
    inputs = [options.student, options.model, options.calibration]
    trained = dbllm(["distill", *inputs, *loss])
    evaluated = dbllm(
        ["eval-ppl", trained, "--text", str(options.text), *shlex.split(options.eval)]
    )
    return float(json.loads((Path(evaluated) / "metrics.json").read_text())["perplexity"])


def dbllm(arguments: list[str]) -> str:
    """The path that a command prints; its bars and tables go to the log."""
    finished = subprocess.run(["dbllm", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return finished.stdout.strip()


def table(
    found: dict[Settings, list[float]],
    lambdas: list[float],
    gammas: list[float],
    ambiguities: list[str],
) -> str:
    lines = [f"plain distillation: {cell(found['teacher', 0.0, 0.0])}", ""]
    heads = " | ".join(f"gamma {gamma:g}" for gamma in gammas)
    for plain in lambdas:
        lines += [f"| lambda {plain:g} | {heads} |", "|---" * (len(gammas) + 1) + "|"]
        for ambiguity in ambiguities:
            cells = [cell(found[ambiguity, gamma, plain]) for gamma in gammas]
            lines.append(f"| {ambiguity} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    main()

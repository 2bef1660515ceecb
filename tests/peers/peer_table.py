"""The quantizers' table in Markdown, from the rows that peer_rows.py measured.

    python tests/peers/peer_table.py tests/peers/rows

Perplexities stand with their difference to dbllm's row of nearest bits, in nats a token with the
paired standard error; accuracies with their standard errors over items.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dbllm_cli.records.evaluation import EvalResult, accuracy, paired_difference

OURS = "dbllm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="folder of the rows")
    options = parser.parse_args()
    rows = {path.stem: json.loads(path.read_text()) for path in options.rows.glob("*.json")}
    require_same_items(rows)
    names = sorted(rows, key=lambda name: place(name, rows))
    print(perplexity_table(names, rows), accuracy_table(names, rows), sep="\n\n")


def require_same_items(rows: dict[str, dict[str, Any]]) -> None:
    """End with what each row is of, unless all are of the same items in the same dtype."""
    tasks = {name: row["tasks"] for name, row in rows.items() if row["tasks"]}
    if len({each["comparable"] for each in tasks.values()}) > 1:
        told = "\n".join(f"{name}: {each['what']}" for name, each in sorted(tasks.items()))
        raise SystemExit(f"rows of different tasks, items or dtypes:\n{told}")


def place(name: str, rows: dict[str, dict[str, Any]]) -> tuple[str, bool, float]:
    """The teacher first; then each of dbllm's rows with those beside it, most bits first."""
    return near(name, rows) or "", not name.startswith(OURS), -rows[name].get("bits", math.inf)


def near(name: str, rows: dict[str, dict[str, Any]]) -> str | None:
    """dbllm's row of nearest bits; none beside the teacher."""
    bits = rows[name].get("bits")
    ours = [each for each in rows if each.startswith(OURS)]
    return min(ours, key=lambda each: abs(rows[each]["bits"] - bits)) if bits and ours else None


def perplexity_table(names: list[str], rows: dict[str, dict[str, Any]]) -> str:
    results = {name: [read(each) for each in rows[name]["perplexity"]] for name in names}
    texts = [result.what for result in results[names[0]]]
    lines = [heading(["", "bits", *texts, "minutes", "GiB", "processor"])]
    for name in names:
        row, base = rows[name], near(name, rows)
        cells = [name, f"{row['bits']:.2f}" if "bits" in row else ""]
        for number, result in enumerate(results[name]):
            apart = ""
            if base not in (None, name):
                difference, error = paired_difference(result, results[base][number])
                apart = f" ({difference:+.3f} ± {error:.3f})"
            cells.append(f"{result.perplexity:,.2f}{apart}")
        cells += [f"{row['seconds'] / 60:.1f}" if "seconds" in row else ""]
        cells += [f"{row['peak_gib']:.1f}" if "peak_gib" in row else "", row.get("processor", "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read(fields: dict[str, Any]) -> EvalResult:
    tuples = {name: tuple(fields[name]) for name in ("losses", "tokens")}
    return EvalResult(**fields | tuples)


def accuracy_table(names: list[str], rows: dict[str, dict[str, Any]]) -> str:
    scored = [name for name in names if rows[name]["tasks"]]
    tasks = list(rows[scored[0]]["tasks"]["scores"]) if scored else []
    lines = [heading(["accuracy", *tasks, "mean"])]
    for name in scored:
        scores = rows[name]["tasks"]["scores"]
        each = [accuracy(scores[task]["acc"]) for task in tasks]
        mean = math.fsum(value for value, _ in each) / len(each)
        error = math.hypot(*(error for _, error in each)) / len(each)
        cells = [f"{value:.3f} ± {error:.3f}" for value, error in (*each, (mean, error))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n{'|---' * len(cells)}|"


if __name__ == "__main__":
    main()

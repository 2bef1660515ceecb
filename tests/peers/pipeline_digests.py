"""What a pipeline writes, as digests: run it in two checkouts to see which bytes changed.

python tests/peers/pipeline_digests.py tests/peers/schemes.yaml --store NEW_FOLDER > digests.json
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

# Keys and provenance differ between checkouts; these hold what was computed.
COMPARED = (".safetensors", "layers.json", "curve.jsonl", "windows.json", "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--store", required=True, help="a folder that is not there yet")
    options = parser.parse_args()
    command = [sys.executable, "-m", "dbllm_cli", "run", str(options.pipeline)]
    run = subprocess.run(
        [*command, "--store", options.store, "--json"], stdout=subprocess.PIPE, check=True
    )
    digests = {
        step["step"]: {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(step["path"]).iterdir())
            if path.name.endswith(COMPARED)
        }
        for step in json.loads(run.stdout)["steps"]
    }
    print(json.dumps(digests, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()

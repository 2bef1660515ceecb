"""Peak memory of a model, in a process of its own: `python -m dbllm_cli.llm.peak_memory`.

Peak memory only ever grows within a process, so bench starts this one anew for every model.
"""

import json
import subprocess
import sys
from pathlib import Path

from dbllm_cli.errors import StageFailedError
from dbllm_cli.llm.decoding import prefill_and_decode
from dbllm_cli.llm.models import load_model
from dbllm_cli.machine.device_memory import peak_device_memory_mib
from dbllm_cli.machine.memory import peak_memory_mib
from dbllm_cli.tensors import torch_dtype


def measure_peak_memory(
    folder: Path,
    *,
    compute_dtype: str,
    shape: tuple[int, int, int],
    device: str,
    trust_remote_code: bool,
) -> float:
    """Peak memory of loading a model and running it once, MiB: the GPU's, or the resident memory.

    Args:
        folder: dense or packed.
        compute_dtype: dtype of the model.
        shape: sequences, prompt tokens and decoded tokens.
        device: torch device.
        trust_remote_code: let transformers run code that comes with the model.

    Raises:
        StageFailedError: the process failed.
    """
    job = json.dumps([str(folder), compute_dtype, shape, device, trust_remote_code])
    command = [sys.executable, "-m", __name__, job]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise StageFailedError(
            f"bench: measuring the memory of {folder} failed: {finished.stderr.strip()[-400:]}",
            "free some memory, or bench a smaller batch",
        )
    return float(finished.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure what argv describes and print MiB."""
    folder, compute_dtype, shape, device, trust_remote_code = json.loads(sys.argv[1])
    dtype = torch_dtype(compute_dtype)
    model = load_model(Path(folder), dtype, device, trust_remote_code)
    batch_size, prompt_tokens, decode_tokens = shape
    prefill_and_decode(model, batch_size, prompt_tokens, decode_tokens, seed=0)
    on_device = peak_device_memory_mib(device)
    peak = peak_memory_mib() if on_device is None else on_device
    sys.stdout.write(f"{peak:.1f}\n")


if __name__ == "__main__":
    main()

import os
import platform
import subprocess
import sys

import pytest

CODE = "from dbllm_cli.machine.compute_dtype import faster_dtype; print(faster_dtype('cpu'))"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is told to use AVX2 alone")
def test_a_processor_without_bfloat16_multiplies_in_float32() -> None:
    # It would take twelve times as long in bfloat16.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == "float32"

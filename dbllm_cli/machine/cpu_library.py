"""Where the compiled CPU kernels are, and how they are chosen. Imports no torch."""

import sysconfig
from pathlib import Path

VARIABLE = "DBLLM_KERNEL"
"""The environment variable that forces an instruction set."""

REFERENCE = "reference"
"""Its value for no compiled kernel: plain torch."""

INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")


def library_path() -> Path | None:
    """The compiled library of this Python, or None."""
    folder = Path(__file__).parents[1] / "kernels"
    # Another Python's may lie there too, of other sources.
    suffixes = (str(sysconfig.get_config_var("EXT_SUFFIX")), ".so")
    paths = (folder / f"_cpu{suffix}" for suffix in suffixes)
    return next((path for path in paths if path.is_file()), None)

"""What a stage computed in: kept beside its result, never part of a key."""

from dataclasses import dataclass

ENVIRONMENT = "environment.json"
"""In a stage's scratch: where its run was begun."""


@dataclass(frozen=True)
class Environment:
    """Where a run of a stage computes. Another one of these may round otherwise.

    Attributes:
        device: torch device.
        processor: its name.
        capability: the instruction set that torch uses on the CPU.
        threads: of torch.
        torch: its version.
        kernel: what packed products run in: a CPU's instruction set, `gpu`, or `reference`.
        compute_dtype: of the products, e.g. `float32`.
    """

    device: str
    processor: str
    capability: str
    threads: int
    torch: str
    kernel: str
    compute_dtype: str

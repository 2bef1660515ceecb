"""Which sequences each step of distill reads."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batches:
    """Batches one after the other, in a fresh order every epoch, from the seed alone.

    Attributes:
        samples: sequences there are.
        batch_size: sequences of a batch; one may reach into the next epoch.
        seed: of the orders.
    """

    samples: int
    batch_size: int
    seed: int

    def indices(self, number: int) -> Tensor:
        """The sequences of batch `number`, int64 `[batch_size]`."""
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        orders = {epoch: self._order(epoch) for epoch in {p // self.samples for p in positions}}
        chosen = [int(orders[p // self.samples][p % self.samples]) for p in positions]
        return torch.tensor(chosen)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        return torch.randperm(self.samples, generator=generator)

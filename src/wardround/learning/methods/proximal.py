"""FedProx: a proximal term keeps a site near the global model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wardround.learning.methods.method import LocalRound, Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedProx(Method):
    """Adds mu/2 |w - w_global|^2 to the loss (Li et al., MLSys 2020, eq. 2); mu = 0 is FedAvg."""

    mu: float = 0.01

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss plus the proximal term over all shared, trainable tensors."""
        for name, tensor in local.trainable().items():
            loss = loss + 0.5 * self.mu * (tensor - local.anchor[name]).square().sum()
        return loss

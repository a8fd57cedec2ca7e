"""FedProx: a proximal term keeps a site near the global model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from wardround.learning.methods.method import LocalRound, Method
from wardround.study.methods import AveragingSettings

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


class FedProxSettings(AveragingSettings):
    """A proximal term keeps sites near the global model (Li et al., 2020)."""

    kind: Literal["fedprox"]
    mu: float = Field(0.01, ge=0.0)
    noised = True
    late = True

    def build(self, protocols: Mapping[str, Any]) -> FedProx:
        """The method."""
        return FedProx(self.weights, mu=self.mu, own_norm=self.unseen_norm == "own")

    def describe(self) -> str:
        """With how much of the term."""
        return f"{self.kind}, mu {self.mu:g}"

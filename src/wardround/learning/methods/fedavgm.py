"""FedAvgM: momentum at the coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from wardround.learning.methods.method import Array, Method
from wardround.learning.methods.server import Floats, Keep, is_trained, slot
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import AveragingSettings


@dataclass(frozen=True)
class FedAvgM(Method):
    """Server momentum, v <- beta v + mean, x <- x + lr v (Hsu et al., 2019)."""

    momentum: float = 0.9
    server_lr: float = 1.0

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """The velocity is a sum of means that die away."""
        if not self.moves_as(FedAvgM):
            return UNKNOWN
        return local.times(max(1.0, self.server_lr / (1.0 - self.momentum)))

    def server_step(self, name: str, mean: Floats, private: Mapping[str, Array], keep: Keep) -> Floats:
        """The momentum step; v is part of the round's commit."""
        if not is_trained(name):
            return mean
        velocity = self.momentum * slot(private, f"momentum/{name}", mean) + mean
        keep(f"momentum/{name}", velocity)
        return self.server_lr * velocity


class FedAvgMSettings(AveragingSettings):
    """Server momentum (Hsu et al., 2019)."""

    kind: Literal["fedavgm"]
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    server_lr: float = Field(1.0, gt=0.0)
    noised = True
    late = True

    def build(self, protocols: Mapping[str, Any]) -> FedAvgM:
        """The method."""
        return FedAvgM(
            self.weights, momentum=self.momentum, server_lr=self.server_lr, own_norm=self.unseen_norm == "own"
        )

    def describe(self) -> str:
        """With the server's momentum and rate."""
        return f"{self.kind}, momentum {self.momentum:g}, server_lr {self.server_lr:g}"

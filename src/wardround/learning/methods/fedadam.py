"""FedAdam: Adam at the coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from wardround.learning.methods.method import Array, Method
from wardround.learning.methods.server import Floats, Keep, is_trained, slot
from wardround.protection.drift import UNKNOWN, UpdateBound, adam_ratio
from wardround.study.methods import AveragingSettings


@dataclass(frozen=True)
class FedAdam(Method):
    """Adam at the server without bias correction (Reddi et al., ICLR 2021, algorithm 2).

    m <- b1 m + (1 - b1) mean, v <- b2 v + (1 - b2) mean^2 with v_0 = tau^2, x <- x + lr m / (sqrt(v) + tau).
    """

    server_lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """No further than `adam_ratio` times the rate, whatever the sites do."""
        if not self.moves_as(FedAdam):
            return UNKNOWN
        return UpdateBound(value=self.server_lr * adam_ratio(None, self.beta1, self.beta2))

    def server_step(self, name: str, mean: Floats, private: Mapping[str, Array], keep: Keep) -> Floats:
        """The Adam step; both moments are part of the round's commit."""
        if not is_trained(name):
            return mean
        first = self.beta1 * slot(private, f"first/{name}", mean) + (1.0 - self.beta1) * mean
        old = private[f"second/{name}"] if f"second/{name}" in private else np.full_like(mean, self.tau**2)
        second = self.beta2 * old + (1.0 - self.beta2) * mean**2
        keep(f"first/{name}", first)
        keep(f"second/{name}", second)
        step: Floats = self.server_lr * first / (np.sqrt(second) + self.tau)
        return step


class FedAdamSettings(AveragingSettings):
    """Adam at the server (Reddi et al., 2021)."""

    kind: Literal["fedadam"]
    server_lr: float = Field(0.001, gt=0.0)
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.99, ge=0.0, lt=1.0)
    tau: float = Field(1e-3, gt=0.0)
    noised = True
    late = True

    def build(self, protocols: Mapping[str, Any]) -> FedAdam:
        """The method."""
        return FedAdam(
            self.weights,
            server_lr=self.server_lr,
            beta1=self.beta1,
            beta2=self.beta2,
            tau=self.tau,
            own_norm=self.unseen_norm == "own",
        )

    def describe(self) -> str:
        """With the server's rate."""
        return f"{self.kind}, server_lr {self.server_lr:g}"

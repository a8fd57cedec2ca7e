"""Optimisers at the coordinator: the mean change is a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.learning.methods.method import MODEL, Method, state_name
from wardround.protection.drift import UNKNOWN, Reach, adam_ratio

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Keep = Callable[[str, Array], None]


def _is_trained(name: str) -> bool:
    # Buffers such as running statistics are no gradients: they are averaged.
    return name.startswith(state_name(MODEL, ""))


def _slot(private: Mapping[str, Array], name: str, like: Floats) -> Floats:
    return private[name] if name in private else np.zeros_like(like)


@dataclass(frozen=True)
class FedAvgM(Method):
    """Server momentum, v <- beta v + mean, x <- x + lr v (Hsu et al., 2019)."""

    momentum: float = 0.9
    server_lr: float = 1.0

    def reach(self, local: Reach) -> Reach:
        """The velocity is a sum of means that die away."""
        if not self.moves_as(FedAvgM):
            return UNKNOWN
        return local.times(max(1.0, self.server_lr / (1.0 - self.momentum)))

    def server_step(self, name: str, mean: Floats, private: Mapping[str, Array], keep: Keep) -> Floats:
        """The momentum step; v is part of the round's commit."""
        if not _is_trained(name):
            return mean
        velocity = self.momentum * _slot(private, f"momentum/{name}", mean) + mean
        keep(f"momentum/{name}", velocity)
        return self.server_lr * velocity


@dataclass(frozen=True)
class FedAdam(Method):
    """Adam at the server without bias correction (Reddi et al., ICLR 2021, algorithm 2).

    m <- b1 m + (1 - b1) mean, v <- b2 v + (1 - b2) mean^2 with v_0 = tau^2, x <- x + lr m / (sqrt(v) + tau).
    """

    server_lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def reach(self, local: Reach) -> Reach:
        """No further than `adam_ratio` times the rate, whatever the sites do."""
        if not self.moves_as(FedAdam):
            return UNKNOWN
        return Reach(value=self.server_lr * adam_ratio(None, self.beta1, self.beta2))

    def server_step(self, name: str, mean: Floats, private: Mapping[str, Array], keep: Keep) -> Floats:
        """The Adam step; both moments are part of the round's commit."""
        if not _is_trained(name):
            return mean
        first = self.beta1 * _slot(private, f"first/{name}", mean) + (1.0 - self.beta1) * mean
        old = private[f"second/{name}"] if f"second/{name}" in private else np.full_like(mean, self.tau**2)
        second = self.beta2 * old + (1.0 - self.beta2) * mean**2
        keep(f"first/{name}", first)
        keep(f"second/{name}", second)
        step: Floats = self.server_lr * first / (np.sqrt(second) + self.tau)
        return step

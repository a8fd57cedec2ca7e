"""FedDyn: sites and coordinator remember how they were pulled apart, so that unlike sites end at the common optimum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from wardround.learning.methods.method import MODEL, Array, Changes, LocalRound, Method
from wardround.learning.methods.server import Floats, Keep, is_trained, slot
from wardround.study.methods import MethodSettings

if TYPE_CHECKING:
    from torch import Tensor

_GRADIENT, _PULL = "gradient/", "pull/"


@dataclass(frozen=True)
class FedDyn(Method):
    """Dynamic regularisation (Acar et al., ICLR 2021, algorithm 1), sites weighed alike.

    A site lowers loss - <g, w> + alpha/2 |w - w_global|^2 and then sets g <- g - alpha (w - w_global), which never
    leaves it. The coordinator sets h <- h - alpha mean(w - w_global) and w_global <- mean(w) - h / alpha, its mean
    being of the sites of the round.
    """

    holds = 1
    stores = 1
    alpha: float = 0.1

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss with both terms, over all shared tensors that gradients reach."""
        for name, tensor in local.trainable().items():
            loss = loss + 0.5 * self.alpha * (tensor - local.anchor[name]).square().sum()
            if _GRADIENT + name in local.memory:
                loss = loss - (local.memory[_GRADIENT + name] * tensor).sum()
        return loss

    def changes(self, local: LocalRound) -> Changes:
        """The changes; what the site remembers of its gradient goes on by them."""
        changes = super().changes(local)
        for name in local.trainable():
            step = -self.alpha * changes[MODEL][name]
            before = local.memory.get(_GRADIENT + name)
            local.memory[_GRADIENT + name] = step if before is None else before + step
        return changes

    def server_step(self, name: str, mean: Floats, private: Mapping[str, Array], keep: Keep) -> Floats:
        """The mean change and what the coordinator remembers; h is part of the round's commit."""
        if not is_trained(name):
            return mean
        pull = slot(private, _PULL + name, mean) - self.alpha * mean
        keep(_PULL + name, pull)
        return mean - pull / self.alpha


class FedDynSettings(MethodSettings):
    """Dynamic regularisation against unlike sites (Acar et al., 2021)."""

    kind: Literal["feddyn"]
    alpha: float = Field(0.1, gt=0.0, description="strength of the regularisation; 0.01 to 0.1 in the paper")

    def build(self, protocols: Mapping[str, Any]) -> FedDyn:
        """The method."""
        return FedDyn("equal", alpha=self.alpha)

    def describe(self) -> str:
        """With its strength."""
        return f"{self.kind}, alpha {self.alpha:g}"

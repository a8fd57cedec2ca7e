"""Unlearning at a hospital that leaves: it takes back what the model knows of its own training patients, and no more.

Gradient ascent at the hospital that leaves, near the model that was sent (Halimi et al., "Federated unlearning: how to
efficiently erase a client in FL", 2022, section 3), with a target that says when it is enough: the loss of the
hospital's own held-out patients is what the loss of a patient looks like who never trained. An attack on membership
compares these two, so past that point ascent would mark the patients instead of hiding them. The others go on training
in the same rounds, so that one sum holds both, and masks can hide it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.method import LocalRound, Method
from wardround.study.methods import AveragingSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Unlearn(Method):
    """FedAvg whose `site` lowers |h - loss| + mu/2 |w - w_global|^2, h the mean loss of its own held-out patients.

    Where its loss is below h it climbs, and where it is above it descends. h is found anew in each round, from the
    model as it comes, and never leaves the site. The loss is that of a batch, or of a piece of it where a batch passes
    in pieces (`local.accumulate`). An unseen hospital gets the mean model. Raises `StudyError` in a round where the
    site has no validation patient.
    """

    site: str = ""
    mu: float = 0.0

    def asks_held_out(self, site: str) -> bool:
        """Whether a site needs the loss of its held-out patients before its first step."""
        return site == self.site

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss of a step at the site that leaves; at others as it is."""
        if local.site != self.site:
            return loss
        held_out = local.facts.validation_loss
        if held_out is None:
            raise StudyError(
                f"site {local.site}: to unlearn its training patients it compares them with held-out ones, and it has "
                "no validation patient; retrain without it instead"
            )
        loss = (loss - held_out).abs()
        for name, tensor in local.trainable().items() if self.mu else ():
            loss = loss + 0.5 * self.mu * (tensor - local.anchor[name]).square().sum()
        return loss


class UnlearnSettings(AveragingSettings):
    """A hospital that leaves takes back what it taught (after Halimi et al., 2022); `wardround forget` writes it."""

    kind: Literal["unlearn"]
    site: str = Field(description="the hospital that leaves: the one of `forget.site`")
    mu: float = Field(0.0, ge=0.0, description="how strongly it is held near the model that it was sent")

    def build(self, protocols: Mapping[str, Any]) -> Unlearn:
        """The method."""
        return Unlearn(self.weights, site=self.site, mu=self.mu, own_norm=self.unseen_norm == "own")

    def describe(self) -> str:
        """Who takes back."""
        return f"{self.kind} of {self.site}, mu {self.mu:g}"

"""FedRep: the head stays at the site and is fitted before the body takes its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from wardround.learning.methods.fedper import _HEAD, FedPer
from wardround.learning.methods.personal import PersonalSettings
from wardround.learning.passes import Pass
from wardround.protection.drift import UNKNOWN, UpdateBound


@dataclass(frozen=True)
class FedRep(FedPer):
    """A round fits the head h to the body phi as it came, then the body to that head (Collins et al., ICML 2021).

    h <- h - eta grad_h F(phi, h), `head_steps` times; then phi <- phi - eta grad_phi F(phi, h), `local.steps` times.
    phi is averaged, h stays. A hospital that did not train gets what it gets with FedPer.
    """

    head_steps: int = 10

    def passes(self) -> tuple[Pass, ...]:
        """The head, then the body."""
        return Pass("head", trains="private", steps=self.head_steps), Pass(trains="shared")

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """That of FedAvg: the body takes the steps of a round, and the head's are not sent."""
        return local if self.moves_as(FedRep) else UNKNOWN


class FedRepSettings(PersonalSettings):
    """The head stays at the site and learns first, then the shared body (Collins et al., 2021)."""

    kind: Literal["fedrep"]
    head: tuple[str, ...] = Field((), description=_HEAD)
    head_steps: int = Field(
        10, ge=1, description="steps of the head in a round, before the `local.steps` of the body; 10 in the paper"
    )

    def build(self, protocols: Mapping[str, Any]) -> FedRep:
        """The method."""
        return FedRep(self.weights, self.unseen, self.head, self.head_steps)

    def describe(self) -> str:
        """With the head's steps."""
        return f"{self.kind}, {self.head_steps} steps of the head first"

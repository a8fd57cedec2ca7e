"""Ditto: every site has a model of its own that is drawn to the common one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from wardround.learning.methods.method import LocalRound, Method
from wardround.learning.passes import Pass
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import AveragingSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ditto(Method):
    """Two models at a site (Li et al., ICML 2021, algorithm 1): the common w, by FedAvg, and its own v.

    v <- v - eta (grad F(v) + lambda (v - w)), with the w that the round began with; v begins as w and never leaves the
    site, which validates, tests and predicts with it. Of several lambdas each site takes, in every round, the one whose
    v has the lowest loss on its validation patients. A hospital that did not train gets w.
    """

    pull: tuple[float, ...] = (1.0,)
    own_steps: int | None = None

    def passes(self) -> tuple[Pass, ...]:
        """The common model, then the site's own."""
        return Pass(), Pass("own", own=True, steps=self.own_steps, choices=self.pull)

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss; of the own model with lambda/2 |v - w|^2, over all shared tensors that gradients reach."""
        if not local.taken.own or local.choice is None:
            return loss
        for name, tensor in local.trainable().items():
            loss = loss + 0.5 * local.choice * (tensor - local.anchor[name]).square().sum()
        return loss

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """That of FedAvg: nothing of the site's own model is sent."""
        return local if self.moves_as(Ditto) else UNKNOWN


_Strength = Annotated[float, Field(ge=0.0)]


class DittoSettings(AveragingSettings):
    """A model of its own at every site, drawn to the common one (Li et al., 2021).

    A round costs twice that of FedAvg at a site, with n values of `pull` 1 + n times, and no more traffic. A hospital
    that did not train gets the common model.
    """

    kind: Literal["ditto"]
    pull: _Strength | tuple[_Strength, ...] = Field(
        1.0,
        description="lambda of the paper: how strongly a site's own model is drawn to the common one; 0 is training "
        "alone. Of a list, such as [0.1, 1, 2], each site takes in every round what its validation patients prefer",
    )
    own_steps: int | None = Field(None, ge=1, description="steps of the own model in a round; default: `local.steps`")

    @property
    def pulls(self) -> tuple[float, ...]:
        """All that a site chooses from."""
        return self.pull if isinstance(self.pull, tuple) else (self.pull,)

    def build(self, protocols: Mapping[str, Any]) -> Ditto:
        """The method."""
        return Ditto(self.weights, self.pulls, self.own_steps, own_norm=self.unseen_norm == "own")

    def describe(self) -> str:
        """With its strength."""
        return f"{self.kind}, pull {' or '.join(f'{pull:g}' for pull in self.pulls)}"

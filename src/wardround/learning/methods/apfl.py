"""APFL: every site mixes the common model with one of its own, and learns how much of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from wardround.learning.methods.method import LocalRound, Method
from wardround.learning.passes import Pass
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import AveragingSettings

_OWN, _ALPHA = "own/", "alpha"


@dataclass(frozen=True)
class APFL(Method):
    """Adaptive personalised federated learning (Deng et al., 2020, algorithm 1): w by FedAvg, and v at the site.

    A site uses v_bar = alpha v + (1 - alpha) w, and with g = grad F(v_bar) sets v <- v - eta alpha g and
    alpha <- alpha - eta_alpha <g, v - w>, kept within [0, 1]. Here w is the one that the round began with, so that a
    round of one step is the paper's; there it is the site's copy, which moves along. v begins as w. Neither v nor alpha
    leaves the site. A hospital that did not train gets w.
    """

    alpha: float = 0.5
    alpha_lr: float | None = None

    def passes(self) -> tuple[Pass, ...]:
        """The common model, then the mixture."""
        return Pass(), Pass("mixture", own=True)

    def begin_pass(self, local: LocalRound) -> None:
        """Load v: the model holds it between steps, and v_bar while a gradient is taken."""
        if not local.taken.own:
            return
        if _ALPHA not in local.memory:
            local.memory[_ALPHA] = next(iter(local.shared.values())).new_full((), self.alpha)
        for name, tensor in local.trainable().items():
            # Without any yet, what the site's own values begin with.
            tensor.detach().copy_(local.memory.get(_OWN + name, tensor.detach()))

    def begin_step(self, local: LocalRound) -> None:
        """Put v_bar into the model, and v aside."""
        if local.taken.own:
            self._mix(local)

    def gradients(self, local: LocalRound) -> None:
        """From the gradient at v_bar to that of v, with v in the model again; alpha takes its step."""
        if not local.taken.own:
            return
        alpha = local.memory[_ALPHA]
        slope = alpha.new_zeros(())
        for name, tensor in local.trainable().items():
            own = local.memory[_OWN + name]
            if tensor.grad is not None:
                slope = slope + (tensor.grad * (own - local.anchor[name])).sum()
                tensor.grad.mul_(alpha)
            tensor.detach().copy_(own)
        rate = local.learning_rate if self.alpha_lr is None else self.alpha_lr
        local.memory[_ALPHA] = (alpha - rate * slope).clamp(0.0, 1.0)

    def end_pass(self, local: LocalRound) -> None:
        """What the site uses is v_bar; v stays for the next round."""
        if local.taken.own:
            self._mix(local)

    def _mix(self, local: LocalRound) -> None:
        alpha = local.memory[_ALPHA]
        for name, tensor in local.trainable().items():
            own = local.memory[_OWN + name] = tensor.detach().clone()
            tensor.detach().copy_(alpha * own + (1.0 - alpha) * local.anchor[name])

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """That of FedAvg: nothing of the mixture is sent."""
        return local if self.moves_as(APFL) else UNKNOWN


class APFLSettings(AveragingSettings):
    """Every site mixes the common model with one of its own, in shares that it learns (Deng et al., 2020).

    A round costs twice that of FedAvg at a site, and no more traffic. A hospital that did not train gets the common
    model.
    """

    kind: Literal["apfl"]
    alpha: float = Field(0.5, ge=0.0, le=1.0, description="the share of a site's own model before round 1")
    alpha_lr: float | None = Field(
        None, ge=0.0, description="the rate at which the share learns; default: `local.lr`, 0: it stays as it is"
    )

    def build(self, protocols: Mapping[str, Any]) -> APFL:
        """The method."""
        return APFL(self.weights, self.alpha, self.alpha_lr, own_norm=self.unseen_norm == "own")

    def describe(self) -> str:
        """With the first share."""
        return f"{self.kind}, alpha {self.alpha:g} at first"

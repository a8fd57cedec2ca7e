"""HarmoFL: sites end where minima are flat, so that the mean of their models lies in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from wardround.learning.methods.method import Method
from wardround.study.methods import AveragingSettings


@dataclass(frozen=True)
class HarmoFL(Method):
    """Weight perturbation (Jiang et al., AAAI 2022, equation 6): a step follows the gradient at w + alpha g / |g|.

    g is the gradient of the same batch at w, over all that learns at the site; the step is taken from w. A step costs
    two. A hospital that did not train gets the same model.
    """

    alpha: float = 0.05

    @property
    def flat_step(self) -> float:
        """How far a step looks."""
        return self.alpha


class HarmoFLSettings(AveragingSettings):
    """Steps that end where minima are flat, each at the price of two (Jiang et al., 2022)."""

    kind: Literal["harmofl"]
    weights: Literal["samples", "equal", "validation"] = Field(
        "equal", description="`validation` is exp(-validation loss), clamped"
    )
    alpha: float = Field(0.05, gt=0.0, description="how far along its gradient a step looks, over all that learns")

    def build(self, protocols: Mapping[str, Any]) -> HarmoFL:
        """The method."""
        return HarmoFL(self.weights, alpha=self.alpha, own_norm=self.unseen_norm == "own")

    def describe(self) -> str:
        """With how far it looks."""
        return f"{self.kind}, alpha {self.alpha:g}"

"""FedEx-LoRA: factors are averaged, and what that leaves out is folded into the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wardround.learning.methods.folded import Product
from wardround.learning.methods.folding import Factors, Folding, FoldingSettings
from wardround.learning.methods.method import Array, Floats, Writers
from wardround.models.low_rank import folded_of, second_of
from wardround.protection.drift import UNKNOWN, UpdateBound


@dataclass(frozen=True)
class FedExLoRA(Folding):
    """The next factors are the sites' mean ones (Singhal et al., ACL 2025).

    W <- W + mean(b_i a_i) - mean(b_i) mean(a_i).
    """

    def next_factors(
        self, name: str, found: Factors, private: Mapping[str, Array], write: Writers
    ) -> tuple[Floats, Floats]:
        """The means."""
        return found.means()

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """Factors are averaged."""
        return local if self.folds_as(FedExLoRA) else UNKNOWN

    def other_moves(self, ranks: Mapping[str, int], reach: Callable[[str], float]) -> dict[str, float]:
        """What is folded is the covariance of the sites' factors, which are all within reach of the ones before.

        |sum p_i (b_i - mean b)(a_i - mean a)|^2 <= sum p_i |b_i - b|^2 sum p_i |a_i - a|^2, by Cauchy's inequality.
        """
        return {folded_of(first): reach(first) * reach(second_of(first)) for first in ranks}

    def left_over(self, found: Factors) -> Product:
        """The mean of products less the product of means."""
        return found.spread()


class FedExLoRASettings(FoldingSettings):
    """Factors are averaged, and the difference of the mean of products and the product of means is folded into the
    weights (Singhal et al., 2025).
    """

    kind: Literal["fedex_lora"]

    def build(self, protocols: Mapping[str, Any]) -> FedExLoRA:
        """The method."""
        return FedExLoRA(self.weights)

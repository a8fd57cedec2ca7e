"""FedEx-LoRA: factors are averaged, and what that leaves out is folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wardround.learning.methods.folded import Product
from wardround.learning.methods.folding import Factors, Folding, FoldingSettings
from wardround.learning.methods.method import Array, Floats, Writers


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

"""FLoRA: the sites' products are stacked, folded into the weights, and begun anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field

from wardround.learning.methods.folded import Product
from wardround.learning.methods.folding import Factors, Folding, FoldingSettings
from wardround.learning.methods.method import Array, Floats, LocalRound, Writers, state_name
from wardround.models.low_rank import folded_of, is_first_factor, second_of
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.wire.random import public_generator

_DRAWN = "drawn"


@dataclass(frozen=True)
class FLoRA(Folding):
    """All of the mean product is folded; the next round begins with fresh first factors (Wang et al., NeurIPS 2024).

    `ranks` are smaller ranks of some sites: the rows of the first factor beyond a site's rank are zero there, and stay
    so, which is to train a product of that rank.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)

    def initial(self, groups: Any, values: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """With the number of draws so far, by factor."""
        public, private = super().initial(groups, values)
        drawn = {state_name(_DRAWN, name): np.zeros(1, np.float32) for name in values if is_first_factor(name)}
        return public, private | drawn

    def begin(self, local: LocalRound) -> None:
        """Leave out the rows that the site has no room for."""
        rank = self.ranks.get(local.site)
        if rank is None:
            return
        for name, tensor in local.shared.items():
            if is_first_factor(name):
                tensor.detach()[rank:] = 0.0

    def next_factors(
        self, name: str, found: Factors, private: Mapping[str, Array], write: Writers
    ) -> tuple[Floats, Floats]:
        """A first factor drawn as the study's was, and a second of zeros."""
        at = state_name(_DRAWN, name)
        drawn = private[at] + 1
        write.private(at, drawn)
        shape = found.a.shape[1:]
        limit = 1.0 / np.sqrt(np.prod(shape[1:]))
        random = public_generator(0, "flora", name, int(drawn[0]))
        return random.uniform(-limit, limit, shape), np.zeros(found.b.shape[1:])

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """Second factors begin at zero; the others are drawn, see `other_moves`."""
        return local if self.folds_as(FLoRA) else UNKNOWN

    def other_moves(self, ranks: Mapping[str, int], reach: Callable[[str], float]) -> dict[str, float]:
        """A site's product is that of a second factor within reach of zero and a first one within reach of a draw.

        Every value of a draw is within 1 / sqrt(width) of zero, so that its length is at most the root of the rank.
        """
        moves: dict[str, float] = {}
        for first, rank in ranks.items():
            drawn = math.sqrt(rank)
            moves |= {first: 2.0 * drawn, folded_of(first): (drawn + reach(first)) * reach(second_of(first))}
        return moves

    def left_over(self, found: Factors) -> Product:
        """All of the mean product."""
        return found.mean_product()


class FLoRASettings(FoldingSettings):
    """The mean of the sites' products is folded into the weights, and factors begin anew (Wang et al., 2024)."""

    kind: Literal["flora"]
    ranks: dict[str, int] = Field(
        default_factory=dict, description="site -> a rank smaller than adapters.rank, for a site that has room for less"
    )

    def build(self, protocols: Mapping[str, Any]) -> FLoRA:
        """The method."""
        return FLoRA(self.weights, ranks=dict(self.ranks))

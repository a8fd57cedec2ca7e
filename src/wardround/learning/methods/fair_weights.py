"""Fair weights: a site that the common model serves worse than its own counts more in the next rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.apart import APART
from wardround.learning.methods.method import (
    Array,
    Changes,
    Floats,
    LocalRound,
    Measured,
    Method,
    Writers,
    state_name,
)
from wardround.learning.methods.server import refuse_robust
from wardround.learning.policy import Parameter
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import MethodSettings
from wardround.wire.host import on_host
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Group

if TYPE_CHECKING:
    from torch import nn

    from wardround.study.schema import Study

# One value a site: in the broadcast its weight over the mean weight, in an update, at the site's place, its gap.
_TENSOR = "weights"
FAIR = state_name(APART, _TENSOR)
_BEFORE, _AFTER = "before", "after"


@dataclass(frozen=True)
class FairWeights(Method):
    """The fairness adjustment of GAutoMRI (Wu et al., IEEE TMI 2024), without its search for an architecture.

    gap_i = L_i(after) - L_i(before): the loss on site i's own validation patients of the common model, which the round
    before led to, less that of the model that the site itself had sent into it. Weights begin at 1/N;
    w_i <- w_i + step x max(gap_i, 0) / max gap, then all are divided by their sum. Where no gap is above 0, they stay.
    Their state is a part of the broadcast: the coordinator computes it, and each site sends its change with its own.

    A site says its gap when it trains from the common model, so that it counts from the round after on: one later than
    where the same process holds all sites. One that has trained no round yet has none. In the arm without one site,
    that site keeps its weight.

    The authors' code takes losses of training examples, before while their model still learned, and after in evaluation
    mode: the difference would be of modes and of overfitting too. Here both are in evaluation mode, on patients that
    trained neither.

    Buffers are averaged with the same weights. A hospital that did not train gets the same model.
    """

    side_channels: ClassVar[frozenset[str]] = frozenset({APART})
    step: float = 0.05
    sites: tuple[str, ...] = ()
    rounds: int = 1

    def within(self, study: Study, sites: int, model: nn.Module) -> Self:
        """With the places of the study's training sites."""
        return replace(self, sites=study.training_sites, rounds=study.schedule.rounds)

    @property
    def measures(self) -> Measured:
        """The gap."""
        return Measured(
            "how much worse than its own the common model is on its validation patients (method.kind=fair_weights)",
            "Choose another method",
        )

    @property
    def discloses(self) -> str:
        """The gap, and to whom."""
        return (
            "how much higher the loss of the common model is than that of its own on its validation patients, once a "
            "round: the coordinator reads it, and all sites the weights that follow, protection.secure or not"
        )

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """A value for each site more, always in 32 bits."""
        own = TensorInfo(_TENSOR, "float32", (len(self.sites),))
        return (*super().groups(shared, ring_bits), Group(APART, (own,), 32))

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """All weigh alike."""
        public, private = super().initial(tuple(g for g in groups if g.name != APART), values)
        return {**public, FAIR: np.ones(len(self.sites), np.float32)}, private

    def asks_held_out(self, site: str) -> bool:
        """Every site measures the common model before it trains."""
        return True

    def begin(self, local: LocalRound) -> None:
        """Keep in mind what the common model came to. Raises `StudyError` for a site without validation patients."""
        if local.facts.validation_loss is None:
            raise StudyError(
                "method.kind=fair_weights compares losses on validation patients and needs one at every site; give "
                f"{local.site} some, or choose another method"
            )
        local.scratch[_AFTER] = local.facts.validation_loss

    def changes(self, local: LocalRound) -> Changes:
        """The changes, and the gap where the site has sent a model before; the loss of this round's is remembered."""
        import torch

        changes = super().changes(local)
        said = torch.zeros(len(self.sites))
        if _BEFORE in local.memory:
            gap = local.scratch[_AFTER] - float(on_host(local.memory[_BEFORE]))
            said[self.sites.index(local.site)] = max(0.0, gap)
        local.memory[_BEFORE] = torch.tensor(local.facts.validation_loss, dtype=torch.float64)
        return {**changes, APART: {_TENSOR: said}}

    def round_weights(self, local: LocalRound, groups: tuple[str, ...]) -> dict[str, float]:
        """The site's weight over the largest; a gap is said as it is, whatever its site weighs."""
        weights = np.asarray(local.public[FAIR], np.float64)
        own = float(weights[self.sites.index(local.site)] / weights.max())
        return {group: 1.0 if group == APART else own for group in groups}

    def least_weights(self, samples: int, groups: tuple[str, ...]) -> dict[str, float]:
        """Those of a site that never had a gap, where all others had the largest in every round."""
        count = max(1, len(self.sites))
        least = (1.0 + self.step * (count - 1)) ** -self.rounds / count
        return {group: 1.0 if group == APART else least for group in groups}

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """A mean goes no further than the furthest."""
        return local if self.moves_as(FairWeights) else UNKNOWN

    def apply_group(
        self,
        group: Group,
        public: Mapping[str, Array],
        private: Mapping[str, Array],
        aggregate: Aggregate,
        write: Writers,
    ) -> None:
        """The mean change; of the gaps the next weights."""
        if group.name != APART:
            super().apply_group(group, public, private, aggregate, write)
            return
        old = np.asarray(public[FAIR], np.float64)
        following = adjusted(old / old.sum(), aggregate.total(APART, _TENSOR), self.step)
        write.public(FAIR, (len(old) * following).astype(np.float32))


def adjusted(weights: Floats, gaps: Floats, step: float) -> Floats:
    """The weights (n,) after gaps (n,): w + step x max(gap, 0) / max gap, over their sum."""
    above = np.maximum(gaps, 0.0)
    largest = above.max(initial=0.0)
    raised = weights + step * above / largest if largest > 0.0 else weights
    found: Floats = raised / raised.sum()
    return found


class FairWeightsSettings(MethodSettings):
    """Sites that the common model serves worse than their own count more (GAutoMRI, Wu et al., 2024)."""

    kind: Literal["fair_weights"]
    step: float = Field(0.05, gt=0.0, le=1.0, description="by how much the weight of the site of the largest gap grows")

    def check(self, study: Study) -> None:
        """Gaps are of one loss, and of each site."""
        refuse_robust(self.kind, study)
        if study.schedule.phases:
            raise ValueError(
                f"method.kind={self.kind} compares losses of two rounds, and with schedule.phases they may be of "
                "different losses; leave one of them out"
            )

    def build(self, protocols: Mapping[str, Any]) -> FairWeights:
        """The method."""
        return FairWeights("equal", step=self.step)

    def describe(self) -> str:
        """With its step."""
        return f"{self.kind}, step {self.step:g}"

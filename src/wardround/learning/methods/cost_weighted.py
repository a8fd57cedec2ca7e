"""Weights by how a site's training loss falls: what won the federated tumour segmentation challenges of 2021 and 2022.

Each site says its change once for every term, each time with another weight, and the coordinator divides each sum by
the sum of its own weights: no site's loss has to be seen for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from wardround.learning.methods.method import MODEL, Array, Changes, Facts, LocalRound, Method, Writers, state_name
from wardround.learning.methods.server import refuse_robust
from wardround.learning.policy import Parameter
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import MethodSettings
from wardround.study.protection import Subspace, TopK
from wardround.wire.host import on_host
from wardround.wire.update import Aggregate, Group

if TYPE_CHECKING:
    from torch import nn

    from wardround.study.schema import Study

# Groups of further copies of the change: weighed by how the loss fell, and by what it was.
FALL, LEVEL = "fall", "level"
_LOSSES = "losses"
# Losses that a site remembers, and of which the level is the sum.
_WINDOW = 5
# Larger falls and levels count as this: a weight has 30 bits, of which one is then 6e-8 of a loss.
_MOST = 64.0


@dataclass(frozen=True)
class CostWeighted(Method):
    """theta = sum over sites of (alpha n_k/N + beta d_k/D + gamma m_k/M) theta_k, each a weighted mean of its own.

    L_k are the site's mean training losses of the rounds in which it took part, which stay in its memory. FedCostWAvg
    (Maechler et al., 2021, equation 2; `fall="ratio"`): d_k = L_k of the round before / L_k of this one, alpha = .5,
    beta = 1 - alpha, gamma = 0. FedPIDAvg (Maechler et al., 2022; `fall="difference"`): d_k = the former less the
    latter, m_k = the sum of the last five, (.45, .45, .1).

    A difference may be below 0, and so may their sum, which the paper divides by all the same: here it counts as 0. A
    site without an earlier loss has d_k = 0. Where all weights of a term are 0, as in round 1, n_k takes their place.
    Buffers are averaged by n_k. A hospital that did not train gets the same model. The paper's sites with far more
    patients than others, which train in fewer rounds, are not made.
    """

    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 0.0
    fall: Literal["ratio", "difference"] = "ratio"
    #: The largest weight that can be said: falls and levels are stretched to it.
    most: float = 1.0

    def within(self, study: Study, sites: int, model: nn.Module) -> CostWeighted:
        """With the largest weight of the study."""
        return replace(self, most=study.protection.max_weight)

    @property
    def terms(self) -> Mapping[str, float]:
        """The share of each further copy of the change."""
        return {name: share for name, share in ((FALL, self.beta), (LEVEL, self.gamma)) if share}

    @property
    def discloses(self) -> str:
        """That weights are of losses."""
        what = "how much its training loss fell" + (" and the sum of its last five" if self.gamma else "")
        return f"{what}, as weights of further copies of its change, in the same sum"

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """The model's, and a copy of what gradients reach for each further term."""
        groups = super().groups(shared, ring_bits)
        return (*groups, *(Group(name, g.tensors, ring_bits) for name in self.terms for g in groups if g.name == MODEL))

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The model's values, once."""
        return super().initial(tuple(g for g in groups if g.name not in self.terms), values)

    def changes(self, local: LocalRound) -> Changes:
        """The same change for every term."""
        changes = super().changes(local)
        return {**changes, **dict.fromkeys(self.terms, changes[MODEL])}

    def round_weights(self, local: LocalRound, groups: tuple[str, ...]) -> dict[str, float]:
        """n_k, d_k and m_k; the round's loss joins those that the site remembers."""
        import torch

        assert local.facts.loss is not None
        before = on_host(local.memory[_LOSSES]).tolist() if _LOSSES in local.memory else []
        local.memory[_LOSSES] = torch.tensor([*before, local.facts.loss][-_WINDOW:])
        losses = on_host(local.memory[_LOSSES]).tolist()
        told = {FALL: self._fall(losses), LEVEL: sum(losses)}
        own = self.weight(local.facts)
        return {g: self._stretched(told[g]) if g in self.terms else own for g in groups}

    def group_weights(self, facts: Facts, groups: tuple[str, ...]) -> dict[str, float]:
        """Before a round no loss is known: falls and levels may be 0."""
        return {g: 0.0 if g in self.terms else self.weight(facts) for g in groups}

    def _fall(self, losses: Sequence[float]) -> float:
        if len(losses) < 2:
            return 0.0
        before, now = losses[-2:]
        if self.fall == "difference":
            return before - now
        # Losses below 0 have no ratio that says how they fell.
        return before / now if now > 0.0 else 0.0

    def _stretched(self, value: float) -> float:
        return min(max(value, 0.0), _MOST) / _MOST * self.most

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """A mean of means goes no further than the furthest."""
        return local if self.moves_as(CostWeighted) else UNKNOWN

    def apply_group(
        self,
        group: Group,
        public: Mapping[str, Array],
        private: Mapping[str, Array],
        aggregate: Aggregate,
        write: Writers,
    ) -> None:
        """All terms, where the model's own group comes; the copies leave nothing of their own."""
        if group.name in self.terms:
            return
        if group.name != MODEL:
            super().apply_group(group, public, private, aggregate, write)
            return
        counted = {name: share for name, share in self.terms.items() if aggregate.weight(name) > 0.0}
        for info in group.tensors:
            moved = (1.0 - sum(counted.values())) * aggregate.mean(MODEL, info.name)
            for name, share in counted.items():
                moved += share * aggregate.mean(name, info.name)
            old = public[state_name(MODEL, info.name)]
            write.public(state_name(MODEL, info.name), np.asarray(old + moved, old.dtype))


class CostWeightedSettings(MethodSettings):
    """The base of methods that weigh by losses."""

    #: What a site's change travels as.
    copies: ClassVar[int]

    def check(self, study: Study) -> None:
        """Every sum has its own weights."""
        refuse_robust(self.kind, study)
        if isinstance(study.protection.compression, Subspace | TopK):
            raise ValueError(
                f"method.kind={self.kind} weighs each round's change by the losses of that round, and "
                f"protection.compression.kind={study.protection.compression.kind} sends parts of it rounds later; set "
                "it to rotation or none"
            )


class FedCostWAvgSettings(CostWeightedSettings):
    """Half of a site's weight by its examples, half by how its training loss fell (Maechler et al., 2021).

    Sites send their change twice.
    """

    kind: Literal["fedcostwavg"]
    alpha: float = Field(0.5, ge=0.0, lt=1.0, description="share of the weight that is by examples")
    copies = 2

    def build(self, protocols: Mapping[str, Any]) -> CostWeighted:
        """The method."""
        return CostWeighted("samples", alpha=self.alpha, beta=1.0 - self.alpha)

    def describe(self) -> str:
        """With the share."""
        return f"{self.kind}, alpha {self.alpha:g}"


class FedPIDAvgSettings(CostWeightedSettings):
    """By examples, by how the training loss fell, and by the sum of the last five (Maechler et al., 2022).

    Sites send their change three times.
    """

    kind: Literal["fedpidavg"]
    alpha: float = Field(0.45, ge=0.0, le=1.0, description="share of the weight that is by examples")
    beta: float = Field(0.45, ge=0.0, le=1.0, description="share by how far the training loss fell")
    gamma: float = Field(0.1, ge=0.0, le=1.0, description="share by the sum of the last five training losses")
    copies = 3

    @model_validator(mode="after")
    def _are_shares(self) -> FedPIDAvgSettings:
        if abs(self.alpha + self.beta + self.gamma - 1.0) > 1e-9:
            raise ValueError(
                f"alpha, beta and gamma are shares of one weight, and add up to "
                f"{self.alpha + self.beta + self.gamma:g}; make it 1"
            )
        return self

    def build(self, protocols: Mapping[str, Any]) -> CostWeighted:
        """The method."""
        return CostWeighted("samples", alpha=self.alpha, beta=self.beta, gamma=self.gamma, fall="difference")

    def describe(self) -> str:
        """With the shares."""
        return f"{self.kind}, alpha {self.alpha:g}, beta {self.beta:g}, gamma {self.gamma:g}"

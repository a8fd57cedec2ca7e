"""FedNova: sites that take different numbers of steps pull the model alike for each of their examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from wardround.learning.methods.method import (
    MODEL,
    Array,
    Changes,
    Facts,
    LocalRound,
    Method,
    Writers,
    state_name,
)
from wardround.learning.methods.server import refuse_robust
from wardround.learning.policy import Parameter
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import MethodSettings
from wardround.study.schema import Local
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Group

if TYPE_CHECKING:
    from torch import nn

    from wardround.study.schema import Study

# The group whose weight is p_i a_i: a weight has 30 bits whatever the ring's are. Its one value is 0.
STEPS = "steps"
_COUNT = "count"


@dataclass(frozen=True)
class FedNova(Method):
    """Normalised averaging (Wang et al., NeurIPS 2020, equation 8).

    A site that takes tau_i steps says d_i = (change) / a_i, where a_i is the sum over its steps k of rate_k / lr times
    (1 - momentum^(k+1)) / (1 - momentum): tau_i for plain SGD of a constant rate, and how far the same gradient in
    every step would move the model, in steps, for SGD with momentum from rest. The coordinator sets
    x <- x + tau_eff sum p_i d_i with tau_eff = sum p_i a_i. FedAvg, sum p_i a_i d_i, pulls towards the sites that take
    more steps; where all take as many it is the same.

    As sums: one of p_i d_i and one of p_i a_i, which is the weight of a group of one value. Buffers are averaged. A
    hospital that did not train gets the same model.
    """

    local: Local | None = None
    #: The largest a_i that a weight can say.
    most: float = 1.0

    def within(self, study: Study, sites: int, model: nn.Module) -> FedNova:
        """With the steps of the study: no site has more examples than `protection.max_weight`."""
        steps = study.local.steps_of(math.ceil(study.protection.max_weight))
        return replace(self, local=study.local, most=_moved(steps, study.local.momentum))

    @property
    def discloses(self) -> str:
        """The sum of the sites' steps."""
        return "its weight times its number of steps, in the same sum; with local.passes both follow from its examples"

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """The model's, and one for the numbers of steps."""
        return (*super().groups(shared, ring_bits), Group(STEPS, (TensorInfo(STEPS, "float32", (1,)),), ring_bits))

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The model's values alone."""
        return super().initial(tuple(g for g in groups if g.name != STEPS), values)

    def gradients(self, local: LocalRound) -> None:
        """Counts the step for what it is."""
        momentum = 0.0 if self.local is None else self.local.momentum
        step = (1.0 - momentum ** (local.step + 1)) / (1.0 - momentum)
        local.scratch[_COUNT] = local.scratch.get(_COUNT, 0.0) + local.rate / local.learning_rate * step

    def changes(self, local: LocalRound) -> Changes:
        """The changes a step, and those of buffers as they are."""
        import torch

        changes = super().changes(local)
        changes[MODEL] = {name: change / local.scratch[_COUNT] for name, change in changes[MODEL].items()}
        changes[STEPS] = {STEPS: torch.zeros(1)}
        return changes

    def group_weights(self, facts: Facts, groups: tuple[str, ...]) -> dict[str, float]:
        """Before a round nothing is counted: what its steps would come to at a constant rate."""
        local = self.local or Local()
        return self._weights(facts, groups, _moved(local.steps_of(facts.samples), local.momentum))

    def round_weights(self, local: LocalRound, groups: tuple[str, ...]) -> dict[str, float]:
        """p_i, and p_i a_i where it is about steps."""
        return self._weights(local.facts, groups, local.scratch[_COUNT])

    def _weights(self, facts: Facts, groups: tuple[str, ...], count: float) -> dict[str, float]:
        weight = self.weight(facts)
        return {group: weight * count / self.most if group == STEPS else weight for group in groups}

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """As FedAvg where all sites take as many steps; else some go further than the mean of their moves."""
        alike = self.local is not None and self.local.passes is None
        return local if alike and self.moves_as(FedNova) else UNKNOWN

    def apply_group(
        self,
        group: Group,
        public: Mapping[str, Array],
        private: Mapping[str, Array],
        aggregate: Aggregate,
        write: Writers,
    ) -> None:
        """The mean change a step, times the mean number of steps."""
        if group.name == STEPS:
            return
        if group.name != MODEL:
            super().apply_group(group, public, private, aggregate, write)
            return
        effective = self.most * aggregate.weight(STEPS) / aggregate.weight(MODEL)
        for info in group.tensors:
            name, mean = state_name(MODEL, info.name), aggregate.mean(MODEL, info.name)
            write.public(name, np.asarray(public[name] + effective * mean, public[name].dtype))


def _moved(steps: int, momentum: float) -> float:
    """How far steps from rest, with the same gradient and rate in each, move the model, in plain steps."""
    return (steps - momentum * (1.0 - momentum**steps) / (1.0 - momentum)) / (1.0 - momentum)


class FedNovaSettings(MethodSettings):
    """Changes a step, for sites that take different numbers of steps (`local.passes`; Wang et al., 2020)."""

    kind: Literal["fednova"]
    weights: Literal["samples", "equal"] = Field("samples", description="p_i: by training examples, or alike")

    def check(self, study: Study) -> None:
        """What is no step of SGD from rest has no number of steps that would normalise it."""
        refuse_robust(self.kind, study)
        local, said = study.local, f"method.kind={self.kind} divides by how far steps of SGD go"
        if local.optimizer != "sgd":
            raise ValueError(f"local.optimizer: {said}, which steps of {local.optimizer} do not; set it to sgd")
        if local.momentum and local.optimizer_state == "keep":
            raise ValueError(
                f"local.optimizer_state: {said} from rest, and a kept momentum goes on; set it to `reset`, or "
                "local.momentum to 0"
            )

    def build(self, protocols: Mapping[str, Any]) -> FedNova:
        """The method."""
        return FedNova(self.weights)

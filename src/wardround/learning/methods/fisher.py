"""Fisher information of a released model: a sum of squared gradients, for updates that are not to forget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from wardround.learning.methods.method import BUFFERS, MODEL, Array, Changes, LocalRound, Method, Writers, state_name
from wardround.learning.policy import Parameter
from wardround.study.methods import MethodSettings
from wardround.wire.update import Aggregate, Group

FISHER = "fisher"


@dataclass(frozen=True)
class Fisher(Method):
    """The diagonal of the empirical Fisher information of the model that the study starts from, over its sites.

    F_j is the mean over training examples of (d loss / d w_j)^2, the loss being the study's own at the true labels:
    where that is a cross-entropy it is the empirical Fisher (Kunstner et al., NeurIPS 2019, eq. 2), a stand-in for the
    Fisher under the model's own labels that Kirkpatrick et al. (PNAS 2017, eq. 3) write; of another loss it is a
    measure of how much each weight moves it. The network is in evaluation: running statistics, no dropout.

    A site takes the first `min(local.steps, its examples)` of its shuffled examples, one a step, and moves nothing; it
    sends the mean of their squares. With as many steps as the largest site has examples that is the mean over all of
    them. The model is released as it was, also to a hospital that did not train.
    """

    @property
    def discloses(self) -> str:
        """The squared gradients."""
        return (
            "in place of its change, the mean square of the loss's gradients over its training examples, a number a "
            "weight; the mean over sites is released (models/fisher.safetensors)"
        )

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """A group of squares in place of the weights; buffers go along and do not change."""
        trainable = tuple(p.info for p in shared if p.trainable)
        buffers = tuple(p.info for p in shared if not p.trainable)
        groups = (Group(FISHER, trainable, ring_bits), Group(BUFFERS, buffers, ring_bits))
        return tuple(group for group in groups if group.tensors)

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Squares of 0, from which their scale starts; and the model.

        Another start than a training's from the same release, since it is another sum: no difference of the two is of
        one site. Of two of these sums the sites' history judges as of any two from one start.
        """
        squares = tuple(info.name for group in groups if group.name == FISHER for info in group.tensors)
        zeros = {state_name(FISHER, name): np.zeros_like(values[name]) for name in squares}
        buffers = {state_name(g.name, t.name): values[t.name] for g in groups if g.name != FISHER for t in g.tensors}
        return {**zeros, **buffers, **{state_name(MODEL, name): values[name] for name in squares}}, {}

    def begin(self, local: LocalRound) -> None:
        """The model as it is released, and squares of 0."""
        local.model.eval()
        local.memory.clear()
        local.memory.update({name: tensor.detach() * 0 for name, tensor in local.trainable().items()})

    def gradients(self, local: LocalRound) -> None:
        """Add the squares of an example that has not come before; leave the optimiser nothing to follow."""
        for name, tensor in local.trainable().items():
            if tensor.grad is not None and local.step < local.facts.samples:
                local.memory[name] += tensor.grad.square()
        for parameter in local.model.parameters():
            parameter.grad = None

    def changes(self, local: LocalRound) -> Changes:
        """Mean squares; nothing of them is kept at the site."""
        count = min(local.steps, local.facts.samples)
        squares = {name: local.memory.pop(name) / count for name in list(local.memory)}
        buffers = super().changes(local)[BUFFERS]
        return {FISHER: squares, BUFFERS: buffers}

    def apply(
        self, public: Mapping[str, Array], private: Mapping[str, Array], aggregate: Aggregate, write: Writers
    ) -> None:
        """The mean over sites; the model as it was."""
        super().apply(public, private, aggregate, write)
        for name in public:
            if name.startswith(state_name(MODEL, "")):
                write.public(name, public[name])

    def also_released(self, public: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
        """The squares, as a file of their own."""
        prefix = state_name(FISHER, "")
        return {FISHER: {n.removeprefix(prefix): public[n] for n in public if n.startswith(prefix)}}


class FisherSettings(MethodSettings):
    """Trains nothing: measures how much each weight of a release matters, for `update.retain: ewc`."""

    kind: Literal["fisher"]
    weights: Literal["samples", "equal"] = Field(
        "equal",
        description="what a site's mean counts: each the same, as each is to lose nothing, or by examples",
    )

    def build(self, protocols: Mapping[str, Any]) -> Fisher:
        """The method."""
        return Fisher(self.weights)

    def describe(self) -> str:
        """What it does."""
        return "fisher: squared gradients of the model that the study starts from; nothing is trained"

"""SCAFFOLD: every step is corrected by how the site's gradient differs from that of all sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from wardround.learning.methods.method import MODEL, Array, Changes, LocalRound, Method, Writers, state_name
from wardround.learning.methods.server import Floats, Keep, is_trained, refuse_robust
from wardround.learning.policy import Parameter
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import MethodSettings
from wardround.wire.host import on_host
from wardround.wire.update import Aggregate, Group

if TYPE_CHECKING:
    from torch import nn

    from wardround.study.schema import Study

# The group, and what is broadcast of it: the control variates.
CONTROL = "control"
# Of each tensor, in the site's memory: c_i, and c_i before the round; for a round: correction and sum of gradients.
_OWN, _BEFORE, _CORRECTION, _SUM = "own/", "before/", "correction/", "sum/"
_ROUND, _RATES = "round", "rates"


@dataclass(frozen=True)
class Scaffold(Method):
    """Stochastic controlled averaging (Karimireddy et al., ICML 2020, algorithm 1, option II), sites weighed alike.

    A site's step follows g + c - c_i, so that it goes where all sites would go. After the round c_i becomes the mean of
    its gradients g over the steps, weighed by their rates, and stays at the site. The coordinator sets x <- x +
    server_lr mean(y - x) and c <- c + |S|/N mean(change of c_i), of the |S| sites of the round among N, and broadcasts
    both. When all take part in every round, the sum of the c_i is N c.

    For plain steps of SGD that mean is option II, c_i - c + (x - y) / (sum of rates), which divides by one rate where
    the steps of a round have several. With momentum, Adam or clipped gradients, of which the paper says nothing, the
    quotient is no gradient any more and would make the correction drift; the mean is one still. Where all sites have
    come to the common optimum, the corrected gradient is 0 at each of them with every optimiser. Weight decay, which is
    the optimiser's, is no part of it.

    A site remembers c_i of before its last round as well, for the case that its update came too late to be in the sum.

    Control variates are said as what they move the model in `unit` = lr x steps: their fixed point then begins as
    coarse as the model's. Buffers are averaged. A hospital that did not train gets the model alone.
    """

    # Its control variate, that of before, what is added to gradients, and their sum.
    holds = 4
    stores = 2
    server_lr: float = 1.0
    #: N; 0 where the method stands alone, and all that answer are taken to be all.
    sites: int = 0
    unit: float = 1.0

    def within(self, study: Study, sites: int, model: nn.Module) -> Scaffold:
        """With the number of the arm's sites, and the unit that follows from its rate."""
        return replace(self, sites=sites, unit=study.local.lr * study.local.steps)

    @property
    def discloses(self) -> str:
        """The change of its control variate."""
        return "the change of its control variate (the mean of its gradients in a round), in the same sum"

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """The model's, and one for the control variates of what gradients reach."""
        groups = super().groups(shared, ring_bits)
        return (*groups, *(Group(CONTROL, g.tensors, ring_bits) for g in groups if g.name == MODEL))

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Control variates begin at 0."""
        public, private = super().initial(groups, values)
        prefix = state_name(CONTROL, "")
        return {n: np.zeros_like(t) if n.startswith(prefix) else t for n, t in public.items()}, private

    def begin(self, local: LocalRound) -> None:
        """What every step of the round adds to its gradient.

        Where the site's last update came to no sum (it was late, or lost), c_i is what it was before: c knows no other.
        """
        last = local.memory.pop(_ROUND, None)
        if last is not None and local.heard is not None and int(on_host(last)) > local.heard:
            for name in local.trainable():
                if _BEFORE + name in local.memory:
                    local.memory[_OWN + name] = local.memory[_BEFORE + name]
        for name in local.trainable():
            correction = local.received(state_name(CONTROL, name)) / self.unit
            if _OWN + name in local.memory:
                correction = correction - local.memory[_OWN + name] / self.unit
            local.scratch[_CORRECTION + name] = correction

    def gradients(self, local: LocalRound) -> None:
        """The gradient is taken note of, and corrected: g + c - c_i."""
        import torch

        learning = {name: tensor for name, tensor in local.trainable().items() if _CORRECTION + name in local.scratch}
        # A step whose gradients overflow in fp16 is left out by the optimiser, and counts for nothing here.
        gradients = [tensor.grad for tensor in learning.values() if tensor.grad is not None]
        rate = torch.full((), local.rate, device=next(iter(local.shared.values())).device)
        if gradients:
            finite = torch.isfinite(torch.stack([g.sum() for g in gradients]).sum())
            rate = torch.where(finite, rate, torch.zeros_like(rate))
        local.scratch[_RATES] = local.scratch.get(_RATES, 0.0) + rate
        for name, tensor in learning.items():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            part = torch.nan_to_num(tensor.grad, nan=0.0, posinf=0.0, neginf=0.0) * rate
            local.scratch[_SUM + name] = local.scratch.get(_SUM + name, 0.0) + part
            tensor.grad += local.scratch[_CORRECTION + name]

    def changes(self, local: LocalRound) -> Changes:
        """The changes of the model, and of the site's control variate."""
        import torch

        changes = super().changes(local)
        changes[CONTROL] = {}
        rates = local.scratch.get(_RATES, 0.0)
        local.memory[_ROUND] = torch.tensor(local.number)
        for name, tensor in local.trainable().items():
            before = local.memory.get(_OWN + name, torch.zeros_like(tensor))
            after = before
            if _SUM + name in local.scratch:
                # Every step left out: the site has seen no gradient.
                after = torch.where(rates > 0.0, self.unit * local.scratch[_SUM + name] / rates, before)
            local.memory[_BEFORE + name], local.memory[_OWN + name] = before, after.detach()
            changes[CONTROL][name] = (after - before).detach()
        return changes

    def heard(
        self, memory: Mapping[str, Array], changes: Mapping[str, Mapping[str, Array]], limits: Mapping[str, float]
    ) -> Mapping[str, Array]:
        """c_i moves as far as was said: what a scale cuts off would stay out of the sum for good."""
        kept = dict(memory)
        for name, change in changes[CONTROL].items():
            limit = limits.get(state_name(CONTROL, name), np.inf)
            kept[_OWN + name] = memory[_OWN + name] - (change - np.clip(change, -limit, limit))
        return kept

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """The mean of what the sites' steps move, times the coordinator's rate."""
        return local.times(self.server_lr) if self.moves_as(Scaffold) else UNKNOWN

    def apply_group(
        self,
        group: Group,
        public: Mapping[str, Array],
        private: Mapping[str, Array],
        aggregate: Aggregate,
        write: Writers,
    ) -> None:
        """Control variates move by the share of the sites that took part."""
        if group.name != CONTROL:
            super().apply_group(group, public, private, aggregate, write)
            return
        share = aggregate.contributors / (self.sites or aggregate.contributors)
        for info in group.tensors:
            name = state_name(CONTROL, info.name)
            moved = public[name] + share * aggregate.mean(CONTROL, info.name)
            write.public(name, moved.astype(public[name].dtype))

    def server_step(self, name: str, mean: Floats, private: Mapping[str, Array], keep: Keep) -> Floats:
        """The mean change, times the coordinator's rate where gradients reach."""
        return self.server_lr * mean if is_trained(name) else mean


class ScaffoldSettings(MethodSettings):
    """Steps corrected by how a site's gradient differs from that of all sites (Karimireddy et al., 2020).

    Sites send twice the model's values, and get twice as many.
    """

    kind: Literal["scaffold"]
    server_lr: float = Field(1.0, gt=0.0, description="the paper's global step size; 1 is the mean of the sites")

    def check(self, study: Study) -> None:
        """Sums of sites' control variates must be whole."""
        refuse_robust(self.kind, study)

    def build(self, protocols: Mapping[str, Any]) -> Scaffold:
        """The method."""
        return Scaffold("equal", server_lr=self.server_lr)

    def describe(self) -> str:
        """With the coordinator's rate."""
        return f"{self.kind}, server_lr {self.server_lr:g}"

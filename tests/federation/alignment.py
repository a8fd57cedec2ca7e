"""What tests of methods for unlike sites share: sites of unlike numbers of patients, and plain training loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tests.federation.rig import Rig
from tests.toys import Points, Regression, toy_study
from wardround.errors import WardroundError
from wardround.federation.exchange import TRAIN
from wardround.federation.refusals import refusal
from wardround.learning.methods.method import LocalRound, Method, Writers
from wardround.tasks.task import Source
from wardround.wire.message import Message
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Layout

Array = npt.NDArray[Any]
Values = dict[str, Tensor]
FINE = {"max_sites": 4, "max_weight": 64.0, "initial_scale": 4.0}


@dataclass(frozen=True)
class Unlike(Regression):
    """Site A has 3 training patients, B 7, C 11; `dropout` draws random numbers in training."""

    dropout: float = 0.0

    def build_model(self) -> nn.Module:
        model = super().build_model()
        assert isinstance(model, nn.Sequential)
        return nn.Sequential(*model[:-1], nn.Dropout(self.dropout), model[-1]) if self.dropout else model

    def dataset(self, site: str, source: Source) -> Points:
        patients = 7 + 4 * (ord(site) - ord("A"))
        points: Points = Regression.dataset(replace(self, patients=patients), site, source)
        return points


def make_unlike(**options: Any) -> Unlike:
    return Unlike(**options)


def unlike_study(method: Mapping[str, Any], local: Mapping[str, Any], rounds: int = 3, **changes: Any) -> Any:
    options = changes.pop("options", {})
    protection = {**FINE, **changes.pop("protection", {})}
    return toy_study(
        task={"kind": "custom", "factory": "tests.federation.alignment:make_unlike", "options": options},
        method=dict(method),
        local={"batch": 4, "optimizer": "sgd", "lr": 0.1, **local},
        schedule={"rounds": rounds, "keep": rounds + 1, **changes.pop("schedule", {})},
        protection=protection,
        **changes,
    )


def plain(rig: Rig, site: str, number: int, values: Mapping[str, Array], step: Callable[..., None]) -> nn.Module:
    """A round at a site in double precision: `step(model, loss, k)` is called for each batch, with `loss(model)`."""
    learner, local = rig.learner(site), rig.study.local
    model = deepcopy(learner.model).double()
    model.load_state_dict({n: torch.from_numpy(np.array(t)) for n, t in values.items()}, strict=False)
    model.train()
    steps = local.steps_of(len(learner.dataset))
    indices = learner._examples.of_round(number, steps * local.batch)
    for k in range(steps):
        batch = indices[k * local.batch : (k + 1) * local.batch]
        x, y = learner.dataset.batch(batch, np.random.default_rng())
        step(model, lambda net, x=x, y=y: (net(x.double()) - y.double()).square().mean(), k)
    return model


def gradients(model: nn.Module, loss: Tensor) -> Values:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def descend(model: nn.Module, by: Values, rate: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= rate * by[name]


def floats(model: nn.Module) -> dict[str, Array]:
    return {n: t.detach().numpy().copy() for n, t in model.state_dict().items() if t.is_floating_point()}


def shared_in(public: Mapping[str, Array]) -> dict[str, Array]:
    """Model and buffers of a state, in double precision."""
    return {
        name.partition("/")[2]: np.asarray(public[name], np.float64)
        for name in public
        if name.partition("/")[0] in ("model", "buffers")
    }


class Away:
    """A site that declines to train in some rounds."""

    def __init__(self, site: Any, rounds: tuple[int, ...]) -> None:
        self._site, self._rounds = site, rounds

    def handle(self, request: Message) -> Message:
        if request.header.kind == TRAIN and request.header.round in self._rounds:
            return refusal(request, WardroundError("away"))
        reply: Message = self._site.handle(request)
        return reply

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)


class Lost(Away):
    """A site that trains in every round, and whose updates of some rounds never arrive."""

    def handle(self, request: Message) -> Message:
        reply: Message = self._site.handle(request)
        if request.header.kind == TRAIN and request.header.round in self._rounds:
            return refusal(request, WardroundError("lost"))
        return reply


# Without messages: quadratic losses, whose optimum is known -----------------------------------------------------------


@dataclass
class Sum:
    """The sum of sites' changes, as a coordinator's hooks see it."""

    layout: Layout
    said: list[tuple[dict[str, dict[str, Tensor]], dict[str, float]]]
    contributors: int = 0

    def __post_init__(self) -> None:
        self.contributors = len(self.said)

    def weight(self, group: str) -> float:
        return sum(weights[group] for _, weights in self.said)

    def mean(self, group: str, tensor: str) -> Array:
        total = sum(weights[group] * changes[group][tensor].double().numpy() for changes, weights in self.said)
        return np.asarray(total / self.weight(group))

    def moved(self, group: str, tensor: str, old: Array) -> Array:
        return self.mean(group, tensor) + old


@dataclass
class Quadratics:
    """Sites with losses a/2 (w - c)^2 of one value, that take numbers of steps; the optimum is of their weighted
    sum.
    """

    curvature: tuple[float, ...]
    centre: tuple[float, ...]
    steps: tuple[int, ...]
    rate: float
    weights: tuple[float, ...] = (1.0, 1.0)
    optimizer: Callable[[list[Tensor], float], torch.optim.Optimizer] = field(
        default=lambda tensors, rate: torch.optim.SGD(tensors, lr=rate)
    )

    @property
    def optimum(self) -> float:
        pull = [w * a for w, a in zip(self.weights, self.curvature, strict=True)]
        return float(np.average(self.centre, weights=pull))

    def final(self, method: Method, rounds: int, start: float = 0.0) -> float:
        """The value after some rounds of a method in which every site takes part."""
        from wardround.learning.methods.method import Facts
        from wardround.learning.policy import Parameter

        info = TensorInfo("w", "float64", (1,))
        groups = method.groups((Parameter(info, trainable=True, buffer=False, layer="Linear"),), 32)
        public, private = method.initial(groups, {"w": np.full(1, start)})
        memories: list[dict[str, Tensor]] = [{} for _ in self.steps]
        for number in range(1, rounds + 1):
            said = []
            for site, steps in enumerate(self.steps):
                w = torch.from_numpy(public["model/w"].copy()).requires_grad_(True)
                local = LocalRound("A", nn.Module(), {"w": w}, {"w": w.detach().clone()}, public, memories[site],
                                   number, steps, self.rate, Facts(round(self.weights[site])))  # fmt: skip
                method.begin(local)
                optimizer = self.optimizer([w], self.rate)
                for local.step in range(steps):
                    optimizer.zero_grad()
                    local.rate = self.rate
                    loss = (0.5 * self.curvature[site] * (w - self.centre[site]) ** 2).sum()
                    method.objective(local, loss).backward()
                    method.gradients(local)
                    optimizer.step()
                changes = method.changes(local)
                said.append((changes, method.round_weights(local, tuple(g.name for g in groups))))
            following: dict[str, Array] = {}
            kept: dict[str, Array] = {}
            total: Any = Sum(Layout(groups), said)
            method.apply(public, private, total, Writers(following.__setitem__, kept.__setitem__))
            public, private = following, kept
        return float(public["model/w"][0])

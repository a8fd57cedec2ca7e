"""Gradient inversion: from what a site sends back to the images it trained on, as an adversary would try it.

Every attack searches images whose training would have sent the same. They differ in how they measure `the same`, how
they search, and what they believe about images:

- DLG (Zhu, Liu & Han, NeurIPS 2019): squared distance of gradients, L-BFGS, labels searched along.
- iDLG (Zhao et al., arXiv:2001.02610): the label is read off the last layer first.
- Inverting Gradients (Geiping et al., NeurIPS 2020): 1 - cosine and total variation, Adam on signs, restarts.
- GradInversion (Yin et al., CVPR 2021): also the statistics of batch normalisation, and several searches that pull
  each other together. Its registration of the searches is left out.
- Unrolling: local steps of SGD are part of what is differentiated, for updates of several steps (Geiping et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

Gradients = tuple[Tensor, ...]
# (network, number of the local step, images (B, H, W), class weights (B, K) or None) -> scalar
Loss = Callable[[nn.Module, int, Tensor, Tensor | None], Tensor]


class Objective(nn.Module):
    """The loss of training on images, with the network's weights in the hands of `functional_call`.

    `shared` names the parameters whose changes leave the site; without it all do.
    """

    def __init__(self, network: nn.Module, loss: Loss, shared: frozenset[str] | None = None) -> None:
        super().__init__()
        self.network = network
        self._loss = loss
        self._shared = shared

    def weights(self) -> dict[str, Tensor]:
        """What training changes, by name, ready to be differentiated."""
        return {name: p.detach().requires_grad_() for name, p in self.named_parameters() if p.requires_grad}

    def leaving(self, gradients: Gradients) -> Gradients:
        """Of the gradients by parameter, those that leave the site."""
        if self._shared is None:
            return gradients
        names = (name.removeprefix("network.") for name, p in self.named_parameters() if p.requires_grad)
        return tuple(g for name, g in zip(names, gradients, strict=True) if name in self._shared)

    def forward(self, step: int, images: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of one local step; scalar."""
        return self._loss(self.network, step, images, labels)


@dataclass(frozen=True, eq=False)
class Victim:
    """One update, and what its adversary knows.

    `images` (N, H, W) are the truth, for scoring and for the number and size that the adversary knows; `labels` (N,)
    are theirs where the task has `classes`. `sent` is what left the site, in the units of a gradient: the gradient of
    one step, or (w_before - w_after) / (rate * steps) after several. `statistics` are the mean and variance that the
    update tells of each batch normalisation. `masks` (N, H, W) is where scores are taken.
    """

    objective: Objective
    images: Tensor
    sent: Gradients
    labels: Tensor | None = None
    classes: int = 0
    steps: int = 1
    rate: float = 0.0
    masks: Tensor | None = None
    statistics: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class Attack:
    """How to search. `tv`, `statistics` and `group` weigh the priors against a distance of about 1."""

    name: str
    distance: Literal["squared", "cosine"] = "cosine"
    search: Literal["lbfgs", "signed_adam"] = "signed_adam"
    iterations: int = 300
    restarts: int = 1
    rate: float = 0.1
    tv: float = 0.0
    statistics: float = 0.0
    group: float = 0.0
    labels: Literal["joint", "read"] = "read"
    unroll: bool = False


ATTACKS = (
    Attack("DLG", distance="squared", search="lbfgs", iterations=120, restarts=2, labels="joint"),
    Attack("iDLG", distance="squared", search="lbfgs", iterations=120, restarts=2),
    Attack("Inverting Gradients", iterations=500, restarts=2, tv=1e-3),
    Attack("GradInversion", distance="squared", iterations=400, restarts=3, tv=1e-3, statistics=1e-2, group=1e-3),
    Attack("Unrolled", iterations=300, restarts=2, tv=1e-3, unroll=True),
)


@dataclass(frozen=True, eq=False)
class Recovered:
    """What an attack found: images (N, H, W) in [0, 1], labels (N,) where there are any, the distance left."""

    images: Tensor
    labels: Tensor | None
    distance: float


def gradient(
    objective: Objective, images: Tensor, labels: Tensor | None = None, *, step: int = 0, differentiable: bool = False
) -> Gradients:
    """What leaves the site of the gradient of one step on images (B, H, W), by parameter."""
    return objective.leaving(_gradient(objective, objective.weights(), step, images, labels, differentiable))


def sent_after(
    objective: Objective,
    steps: int,
    rate: float,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    differentiable: bool = False,
) -> Gradients:
    """(w_before - w_after) / (rate * steps) of local SGD, step k on the k-th part of images (steps * B, H, W)."""
    weights = objective.weights()
    total: Gradients | None = None
    size = len(images) // steps
    for step in range(steps):
        part = slice(step * size, (step + 1) * size)
        found = _gradient(
            objective, weights, step, images[part], None if labels is None else labels[part], differentiable
        )
        total = found if total is None else tuple(a + b for a, b in zip(total, found, strict=True))
        weights = {
            name: w - rate * g if differentiable else (w - rate * g).detach().requires_grad_()
            for (name, w), g in zip(weights.items(), found, strict=True)
        }
    assert total is not None
    return objective.leaving(tuple(g / steps for g in total))


def _gradient(
    objective: Objective,
    weights: dict[str, Tensor],
    step: int,
    images: Tensor,
    labels: Tensor | None,
    differentiable: bool,
) -> Gradients:
    # Batch normalisation writes into its buffers, so each call gets its own.
    buffers = {name: b.clone() for name, b in objective.named_buffers()}
    loss = functional_call(objective, {**weights, **buffers}, (step, images, labels))
    return torch.autograd.grad(loss, list(weights.values()), create_graph=differentiable, materialize_grads=True)


def one_hot(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """(N,) -> (N, classes)."""
    return nn.functional.one_hot(labels, classes).to(like.dtype)


def labels_from_last_layer(victim: Victim) -> Tensor | None:
    """The labels (N,) that the last layer gives away; None where the task has no classes.

    With inputs of that layer not negative and a cross-entropy, only the rows of classes in the batch have a negative
    gradient (Zhao et al. 2020; for several images Yin et al. 2021, who assume that no class comes twice).
    """
    if victim.labels is None or not victim.classes:
        return None
    rows = next(g for g in reversed(victim.sent) if g.ndim == 2 and g.shape[0] == victim.classes)
    return rows.min(dim=1).values.argsort()[: len(victim.images)].repeat(len(victim.images))[: len(victim.images)]


def invert(attack: Attack, victim: Victim, seed: int) -> Recovered:
    """Run an attack on one update; deterministic for a seed. The truth is used for nothing but its shape."""
    found = list(_searches(attack, victim, torch.Generator().manual_seed(seed)))
    return min(found, key=lambda each: each.distance)


def _searches(attack: Attack, victim: Victim, random: torch.Generator) -> Iterator[Recovered]:
    like = victim.sent[0]
    count = attack.restarts if attack.group else 1
    for _ in range(1 if attack.group else attack.restarts):
        shape = (count, *victim.images.shape)
        start = (0.5 + 0.2 * torch.randn(shape, generator=random, dtype=like.dtype)).clamp(0.0, 1.0)
        yield from _search(attack, victim, start, random)


def _search(attack: Attack, victim: Victim, start: Tensor, random: torch.Generator) -> Iterator[Recovered]:
    """Search from images (R, N, H, W); what was found from each of the R."""
    images = start.clone().requires_grad_()
    read = labels_from_last_layer(victim) if attack.labels == "read" else None
    logits: Tensor | None = None
    if victim.classes and attack.labels == "joint":
        size = (len(start), len(victim.images), victim.classes)
        logits = torch.randn(size, generator=random, dtype=start.dtype).requires_grad_()

    def labels_of(index: int) -> Tensor | None:
        if logits is not None:
            return logits[index].softmax(dim=-1)
        return None if read is None else one_hot(read, victim.classes, start)

    def total() -> Tensor:
        cost = start.new_zeros(())
        for index in range(len(start)):
            with _batch_statistics(victim.objective, bool(attack.statistics)) as seen:
                predicted = _predict(attack, victim, images[index], labels_of(index))
            cost = cost + distance(attack.distance, predicted, victim.sent)
            cost = cost + attack.tv * total_variation(images[index])
            cost = cost + attack.statistics * _statistics_distance(seen, victim)
        if attack.group:
            cost = cost + attack.group * (images - images.mean(dim=0, keepdim=True).detach()).square().sum()
        return cost

    variables = [images] if logits is None else [images, logits]
    if attack.search == "lbfgs":
        _lbfgs(total, variables, attack)
    else:
        _signed_adam(total, variables, images, attack)
    # A search that ran away has found nothing.
    ended = torch.nan_to_num(images.detach(), nan=0.5).clamp(0.0, 1.0)
    for index in range(len(start)):
        labels = labels_of(index)
        left = float(distance(attack.distance, _predict(attack, victim, ended[index], labels), victim.sent).detach())
        named = None if labels is None else labels.detach().argmax(dim=-1)
        yield Recovered(ended[index], named, left if left == left else float("inf"))


def _predict(attack: Attack, victim: Victim, images: Tensor, labels: Tensor | None) -> Gradients:
    """What training on these images would have sent; without unrolling, several steps are taken for one big one."""
    if attack.unroll and victim.steps > 1:
        return sent_after(victim.objective, victim.steps, victim.rate, images, labels, differentiable=True)
    if victim.steps == 1:
        return gradient(victim.objective, images, labels, differentiable=True)
    size = len(images) // victim.steps
    parts = [slice(k * size, (k + 1) * size) for k in range(victim.steps)]
    each = [
        gradient(victim.objective, images[p], None if labels is None else labels[p], step=k, differentiable=True)
        for k, p in enumerate(parts)
    ]
    return tuple(torch.stack(gs).mean(dim=0) for gs in zip(*each, strict=True))


def distance(kind: Literal["squared", "cosine"], found: Gradients, sent: Gradients) -> Tensor:
    """|f - s|^2 / |s|^2, or 1 - cosine, over all parameters together; scalar."""
    pairs = list(zip(found, sent, strict=True))
    size = torch.stack([s.square().sum() for s in sent]).sum().clamp_min(1e-30)
    if kind == "squared":
        return torch.stack([(f - s).square().sum() for f, s in pairs]).sum() / size
    inner = torch.stack([(f * s).sum() for f, s in pairs]).sum()
    norm = torch.stack([f.square().sum() for f in found]).sum().clamp_min(1e-30)
    return 1.0 - inner / (norm * size).sqrt()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, anisotropic: (N, H, W) -> scalar."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def _lbfgs(total: Callable[[], Tensor], variables: Sequence[Tensor], attack: Attack) -> None:
    optimizer = torch.optim.LBFGS(
        variables, lr=1.0, max_iter=attack.iterations, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-12, tolerance_change=1e-14,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        cost = total()
        _fill(cost, variables)
        return cost

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def _signed_adam(total: Callable[[], Tensor], variables: Sequence[Tensor], images: Tensor, attack: Attack) -> None:
    optimizer = torch.optim.Adam(variables, lr=attack.rate)
    marks = [int(attack.iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks, gamma=0.1)
    best, kept = float("inf"), images.detach().clone()
    for _ in range(attack.iterations):
        optimizer.zero_grad(set_to_none=True)
        cost = total()
        if float(cost.detach()) < best:
            best, kept = float(cost.detach()), images.detach().clone()
        _fill(cost, variables)
        for variable in variables:
            if variable.grad is not None:
                variable.grad = torch.nan_to_num(variable.grad).sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0.0, 1.0)
    with torch.no_grad():
        images.copy_(kept)


def _fill(cost: Tensor, variables: Sequence[Tensor]) -> None:
    """Backward into the images alone, not into the network."""
    for variable, found in zip(
        variables, torch.autograd.grad(cost, list(variables), materialize_grads=True), strict=True
    ):
        variable.grad = found


@dataclass
class _Seen:
    """Mean and variance of what entered each batch normalisation."""

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@contextmanager
def _batch_statistics(objective: Objective, wanted: bool) -> Iterator[_Seen]:
    seen = _Seen()

    def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        seen.pairs.append((inputs[0].mean(dim=axes), inputs[0].var(dim=axes, unbiased=False)))

    layers = [m for m in objective.modules() if isinstance(m, _BatchNorm)] if wanted else []
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def statistics_of(
    objective: Objective, images: Tensor, labels: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], ...]:
    """What running statistics tell: mean and variance at every batch normalisation, in the first step."""
    with _batch_statistics(objective, True) as seen:
        gradient(objective, images, labels)
    return tuple((mean.detach(), variance.detach()) for mean, variance in seen.pairs)


def _statistics_distance(seen: _Seen, victim: Victim) -> Tensor:
    cost = victim.sent[0].new_zeros(())
    for (mean, variance), (told, spread) in zip(seen.pairs, victim.statistics, strict=False):
        cost = cost + (mean - told).square().mean() + (variance - spread).square().mean()
    return cost

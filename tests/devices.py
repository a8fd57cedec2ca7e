"""Torch's `meta` device as a site's: it has shapes and no numbers, so whatever reads a number past `on_host` fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wardround.imaging.acquisition.ct.operator import StoredWeights
from wardround.learning.device import Compute, compute_of
from wardround.learning.examples import ExampleStream, SiteExamples
from wardround.learning.training import Learner
from wardround.plan.arm_specs import ArmSpecs
from wardround.storage.store import NOTHING
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.wire import host

META = Compute(torch.device("meta"))
DEVICES = [
    "meta",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")),
]


def device_named(name: str, monkeypatch: pytest.MonkeyPatch) -> Compute:
    """Where a test computes; `meta` gets stand-ins for what it has no kernel or no number for."""
    if name != "meta":
        return compute_of(name, "fp32", "A")
    stand_ins(monkeypatch)
    return META


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to the host are zeros, or true, and sparse products have the shape that they would have."""
    copied = host.copied

    def made_up(tensor: Tensor) -> np.ndarray:
        return copied(torch.full_like(tensor, tensor.dtype == torch.bool, device="cpu"))

    def forward(self: StoredWeights, pixels: Tensor) -> Tensor:
        return pixels.new_zeros(_rows(self), pixels.shape[1])

    def adjoint(self: StoredWeights, rays: Tensor) -> Tensor:
        assert rays.shape[0] == _rows(self)
        return rays.new_zeros(_columns(self), rays.shape[1])

    plain = StoredWeights.forward, StoredWeights.adjoint
    monkeypatch.setattr(host, "copied", lambda t: made_up(t) if t.is_meta else copied(t))
    monkeypatch.setattr(StoredWeights, "forward", lambda s, x: (forward if x.is_meta else plain[0])(s, x))
    monkeypatch.setattr(StoredWeights, "adjoint", lambda s, y: (adjoint if y.is_meta else plain[1])(s, y))


def _rows(weights: StoredWeights) -> int:
    return int(weights._base.shape[1 if weights._transposed else 0])


def _columns(weights: StoredWeights) -> int:
    return int(weights._base.shape[0 if weights._transposed else 1])


def arm_specs_of(study: Study, embeddings: dict[str, Path] | None = None) -> ArmSpecs:
    """What a study comes to, on a machine where it may name any code."""
    return ArmSpecs(study, (), embeddings, Plugins(code=True))


def learner_of(plans: ArmSpecs, folder: Path, compute: Compute, site: str = "A") -> Learner:
    """A site's learner in the federated arm, its data in `folder`."""
    study, arm_spec = plans.study, plans.arm_spec("federated")
    dataset = plans.task.dataset(site, (folder,))
    return Learner(
        site=site,
        model_context=plans.model_context.on(compute),
        dataset=dataset,
        examples=SiteExamples(ExampleStream(len(dataset), study.seed, site)),
        method=arm_spec.method,
        policy=arm_spec.policy,
        local=study.local,
        rounds=study.schedule.rounds,
        seed=study.seed,
        groups=tuple(g.name for g in arm_spec.layout.groups),
        curriculum=arm_spec.curriculum,
    )


def step_and_evaluation(study: Study, folder: Path, compute: Compute) -> set[str]:
    """One round of a site, and the names of what it then measures on validation patients."""
    plans = arm_specs_of(study)
    learner = learner_of(plans, folder, compute)
    public, _ = plans.initial(plans.arm_spec("federated"))
    learner.load(public, NOTHING)
    learner.train(1, public, NOTHING)
    measured = set(learner.held_out.evaluate("validation"))
    assert measured == {spec.name for spec in plans.task.metrics}
    return measured


def tensors_of(learner: Learner) -> Iterator[Tensor]:
    """Every parameter and buffer of a learner's model."""
    yield from learner.model.state_dict().values()

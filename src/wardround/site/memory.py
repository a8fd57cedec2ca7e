"""What training takes at a site, and whether it has room for it. For eyes at the site, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.learning.device import Compute, Placed, moved
from wardround.learning.footprint import Footprint, footprint
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.arms import FEDERATED
from wardround.tasks.task import Dataset
from wardround.wire.random import public_generator

GIGABYTE = 10**9
#: What CUDA and its libraries take of a GPU in each process that uses it; some 0.3 to 0.6 GB, by version and GPU.
CONTEXT = 600 * 10**6


def footprint_of(arm_specs: ArmSpecs, dataset: Dataset, compute: Compute) -> Footprint:
    """What training takes with a site's first examples, on its device where that is a GPU."""
    arm_spec = arm_specs.arm_spec(FEDERATED)
    local = arm_spec.arm.local
    indices = [number % len(dataset) for number in range(local.pieces[0])]
    batch = dataset.batch(indices, public_generator(arm_specs.study.seed, "footprint"))
    gpu = compute.device.type == "cuda"

    def step(model: nn.Module, device: torch.device) -> Tensor:
        # Precision is the GPU's: torch has no 16 bits without numbers.
        placed = Placed(arm_specs.task, compute if gpu else Compute(device))
        return placed.loss(model, moved(batch, device))

    shared = arm_spec.policy.names("shared")
    own, holds = arm_spec.own, arm_spec.method.copies
    device = compute.device if gpu else None
    found = footprint(arm_specs.model_context, shared, local, step, device, own, holds)
    return found if arm_specs.study.task.taught_by is None else replace(found, teacher=arm_specs.teacher.nbytes)


def processes_that_fit(most: int, taken: Mapping[str, tuple[int, int]]) -> int:
    """How many processes, of `most`, may train at once, and at least one.

    `taken` says by device what a site takes and what is free. Any process may train at any site, so that all of them
    may be on one device, each with what CUDA itself takes.
    """
    return max(1, min([most, *(free // (needed + CONTEXT) for needed, free in taken.values())]))


def check_memory(taken: Mapping[str, tuple[Footprint, float | None]]) -> None:
    """Raise `StudyError` where training takes more than a site's `memory`: by site, what it takes, and its GB."""
    lacking = [
        f"{site} needs {found.total / GIGABYTE:.3g} GB and has {room:g}"
        for site, (found, room) in taken.items()
        if room is not None and found.total > room * GIGABYTE
    ]
    if lacking:
        raise StudyError(
            f"sites.SITE.memory: too little for a training step at {'; '.join(lacking)}. Let batches pass in pieces "
            "(local.accumulate), compute blocks twice (local.checkpoint), take a smaller local.batch or model, freeze "
            "more of it (parts.frozen), or take a machine with more memory"
        )

"""A chain of two stages that trains in milliseconds: k-space -> image -> mask, two networks with a loss each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.toys import Hold, Points, Regression, toy_study
from wardround.study.schema import Study
from wardround.tasks.stages import weighted_sum
from wardround.tasks.task import MetricSpec, Source
from wardround.wire.random import public_generator

SIZE = 8
STAGES = ("reconstruct", "segment")
#: Apart, the one after the other; then both together.
PHASES = (
    {"rounds": 1, "train": ["reconstruct"]},
    {"rounds": 1, "train": ["segment"]},
    {"train": ["reconstruct", "segment"], "weights": {"segment": 0.5}},
)


class Chain(nn.Module):
    """A network from zero-filled images to images, and one from those to logits of a mask: (B, 1, 8, 8) each."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.reconstruct = _network(2, norm)
        self.segment = _network(1, norm)

    def forward(self, kspace: Tensor) -> tuple[Tensor, Tensor]:
        zero_filled = torch.fft.ifft2(torch.complex(*kspace.unbind(1)), norm="ortho")
        image = self.reconstruct(torch.stack((zero_filled.real, zero_filled.imag), 1))
        return image, self.segment(image)


def _network(channels: int, norm: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(channels, 4, 3, padding=1)]
    if norm:
        layers.append(nn.BatchNorm2d(4))
    return nn.Sequential(*layers, nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))


@dataclass(frozen=True)
class ChainTask(Regression):
    """Every other column of k-space is missing; a bright square is the tumour."""

    norm: bool = True
    stages: tuple[str, ...] = STAGES

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        return (MetricSpec("dice", 0.0, 1.0, 1e-6, True), MetricSpec("mse", 0.0, 100.0, 1e-6, False))

    def build_model(self) -> nn.Module:
        return Chain(self.norm)

    def dataset(self, site: str, source: Source) -> Points:
        random, count = public_generator(5, site, "chain"), 2 * self.patients
        image = 0.1 * random.standard_normal((count, SIZE, SIZE))
        mask = np.zeros((count, SIZE, SIZE))
        for number in range(count):
            row, column = random.integers(0, SIZE - 3, 2)
            mask[number, row : row + 3, column : column + 3] = 1.0
        image += mask
        kspace = np.fft.fft2(image, norm="ortho")
        kspace[..., 3::2] = 0.0
        x, y = np.stack((kspace.real, kspace.imag), 1), np.stack((image, mask), 1)
        order = list(range(self.patients))
        splits = {"train": order[:-4], "validation": order[-4:-2], "test": order[-2:]}
        return Points(torch.from_numpy(x).float(), torch.from_numpy(y).float(), splits, site)

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        kspace, truth = batch
        Hold.step()
        image, logits = model(kspace)
        return {
            "reconstruct": (image - truth[:, :1]).square().mean(),
            "segment": binary_cross_entropy_with_logits(logits, truth[:, 1:]),
        }

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return weighted_sum(self.losses(model, batch))

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        kspace, truth = batch
        image, logits = model(kspace)
        found, mask = (logits > 0.0).float(), truth[:, 1:]
        overlap = 2.0 * (found * mask).sum((1, 2, 3)) / (found + mask).sum((1, 2, 3))
        return {"dice": overlap, "mse": (image - truth[:, :1]).square().mean((1, 2, 3))}


def make_chain(**options: Any) -> ChainTask:
    """The factory that these studies name."""
    return ChainTask(**options)


def chain_study(**changes: Any) -> Study:
    """A study of two sites and three rounds, a phase each."""
    options = changes.pop("options", {})
    return toy_study(
        changes.pop("sites", "AB"),
        **{
            "task": {"kind": "custom", "factory": "tests.chain:make_chain", "options": options},
            "method": {"kind": "fedavg", "weights": "equal"},
            "local": {"steps": 2, "batch": 4, "optimizer": "adam", "lr": 0.02},
            **changes,
            "schedule": {"rounds": 3, "keep": 4, "phases": PHASES, **changes.get("schedule", {})},
        },
    )


def stage_of(name: str) -> str:
    """The stage of a tensor, by its name in the model or in the global state."""
    return name.rpartition("/")[2].split(".")[0]


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, set[bool]]:
    """By stage, whether tensors differ in any bit."""
    found: dict[str, set[bool]] = {stage: set() for stage in STAGES}
    for name in before:
        found[stage_of(name)].add(np.asarray(before[name]).tobytes() != np.asarray(after[name]).tobytes())
    return found

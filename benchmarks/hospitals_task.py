"""The workload of hospitals.py: a model of any size that learns next to nothing, so that a round is what moves it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wardround.tasks.task import Dataset, MetricSpec, Source, Split
from wardround.wire.random import public_generator

LAYERS = 20
#: Numbers of a patient: the inputs of the one layer that learns.
_FEATURES = 4


class Large(nn.Module):
    """`values` float32 values, in twenty layers that nothing uses, beside five that learn."""

    def __init__(self, values: int) -> None:
        super().__init__()
        # Without numbers drawn: that would take longer than the rounds that are measured.
        self.layers = nn.ParameterList(torch.full((values // LAYERS,), 0.01) for _ in range(LAYERS))
        self.head = nn.Linear(_FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) -> (B, 1)."""
        found: Tensor = self.head(x)
        return found


@dataclass(frozen=True)
class Points:
    """Pairs of one site, a patient each."""

    x: Tensor
    y: Tensor

    def fingerprint(self) -> str:
        return hashlib.sha256(self.x.numpy().tobytes() + self.y.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        return self.x[list(indices)], self.y[list(indices)]

    def patients(self, split: Split) -> int:
        return 4 if split == "train" else 2

    def evaluation(self, split: Split) -> Iterator[tuple[int, Any]]:
        begin = {"train": 0, "validation": 4, "test": 6}[split]
        for number in range(begin, begin + self.patients(split)):
            yield number, (self.x[number : number + 1], self.y[number : number + 1])


@dataclass(frozen=True)
class LargeTask:
    """A line through points."""

    values: int
    metrics = (MetricSpec("error", 0.0, 100.0, 1e-6, False),)

    def build_model(self) -> nn.Module:
        return Large(self.values)

    def dataset(self, site: str, source: Source) -> Points:
        x = torch.from_numpy(public_generator(5, site, "points").standard_normal((8, _FEATURES)).astype(np.float32))
        return Points(x, x.sum(dim=1, keepdim=True))

    def pooled(self, parts: Sequence[Dataset]) -> Dataset:
        raise ValueError("this workload has no pooled arm")

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        return {"error": (model(x) - y).square().squeeze(1)}


def make_task(**options: Any) -> LargeTask:
    """The factory that the study names."""
    return LargeTask(**options)

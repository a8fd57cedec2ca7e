"""Skin pictures as a frozen encoder sees them: a linear classifier on its features learns in seconds what it can."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CLASSES, FEATURES = 7, 1280
SPLITS = ("train", "validation", "test")
FILE = "features.npz"
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """Features (n, 1280), classes (n,), whose each picture is, and in which part: 0, 1, 2 for `SPLITS`."""

    x: Tensor
    y: Tensor
    patient: np.ndarray[Any, Any]
    part: np.ndarray[Any, Any]

    @property
    def prior(self) -> Tensor:
        """The log of the source's shares of the diagnoses in training, by which its logits are adjusted."""
        counts = torch.bincount(self.y[self.part == 0], minlength=CLASSES).float()
        return torch.log((counts + 1.0) / (counts.sum() + CLASSES))

    def _rows(self, rows: Any) -> Batch:
        return self.x[rows], self.y[rows], self.prior

    def fingerprint(self) -> str:
        return hashlib.sha256(self.x.numpy().tobytes() + self.part.tobytes()).hexdigest()

    def __len__(self) -> int:
        return int((self.part == 0).sum())

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> Batch:
        return self._rows(np.flatnonzero(self.part == 0)[list(indices)])

    def owners(self) -> list[int]:
        return [int(p) for p in self.patient[self.part == 0]]

    def patients(self, split: str) -> int:
        return len(np.unique(self.patient[self.part == SPLITS.index(split)]))

    def evaluation(self, split: str) -> Iterator[tuple[int, Batch]]:
        inside = self.part == SPLITS.index(split)
        for number, patient in enumerate(np.unique(self.patient[inside])):
            yield number, self._rows(np.flatnonzero(inside & (self.patient == patient)))


class Diagnoses:
    """The task: seven diagnoses, with a loss as if a source saw all of its own equally often."""

    @property
    def metrics(self) -> Any:
        from wardround.tasks.task import MetricSpec

        return (MetricSpec("accuracy", 0.0, 1.0, 1e-6, True),)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.2), nn.Linear(FEATURES, CLASSES))

    def dataset(self, site: str, source: Any) -> Source:
        with np.load(source[0] / FILE) as file:
            x = torch.from_numpy(file["x"].astype(np.float32))
            return Source(x, torch.from_numpy(file["y"].astype(np.int64)), file["patient"], file["part"])

    def pooled(self, parts: Sequence[Source]) -> Source:
        raise NotImplementedError("this benchmark pools nothing")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y, prior = batch
        found: Tensor = cross_entropy(model(x) + prior, y)
        return found

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        x, y, _ = batch
        return {"accuracy": (model(x).argmax(1) == y).float()}


def make_task(**options: Any) -> Diagnoses:
    """The factory that the study names."""
    return Diagnoses()

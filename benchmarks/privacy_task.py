"""The second workload of privacy.py: chest X-rays of PneumoniaMNIST at sites with more than a thousand patients each.

PneumoniaMNIST (MedMNIST v2, CC BY 4.0) does not say whose an image is: each is taken as one patient's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wardround.tasks.task import Dataset, MetricSpec, Source, Split
from wardround.wire.random import public_generator

SITES = ("A", "B", "C")
VALIDATION = 0.1
Floats = npt.NDArray[np.float64]


def images(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [-1, 1] and labels (N,), 1 for pneumonia, of `train` or `test`."""
    file = Path(os.environ.get("WARDROUND_DATA", "data")) / "pneumoniamnist" / "pneumoniamnist.npz"
    if not file.exists():
        raise SystemExit("set WARDROUND_DATA to a folder that holds pneumoniamnist/pneumoniamnist.npz")
    data = np.load(file)
    pixels = data[f"{split}_images"].astype(np.float32)[:, None] / 127.5 - 1.0
    return torch.from_numpy(pixels), torch.from_numpy(data[f"{split}_labels"][:, 0].astype(np.float32))


@dataclass(frozen=True)
class XRays:
    """One site's images and labels, validation patients behind the training ones; no test patients of its own."""

    x: Tensor
    y: Tensor
    training: int

    def fingerprint(self) -> str:
        return hashlib.sha256(self.x.numpy().tobytes() + self.y.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return self.training

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        return self.x[list(indices)], self.y[list(indices)]

    def owners(self) -> Sequence[int]:
        return range(self.training)

    def patients(self, split: Split) -> int:
        return {"train": self.training, "validation": len(self.x) - self.training, "test": 0}[split]

    def evaluation(self, split: Split) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        if split == "validation":
            for patient in range(self.training, len(self.x)):
                yield patient, (self.x[patient : patient + 1], self.y[patient : patient + 1])


class PneumoniaTask:
    """Pneumonia or not, by two convolutions and a linear layer: 2,049 parameters."""

    metrics: tuple[MetricSpec, ...] = (MetricSpec("accuracy", 0.0, 1.0, 1e-6, larger_is_better=True),)

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.Tanh(),
            nn.Conv2d(8, 8, 5, stride=2, padding=2),
            nn.Tanh(),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Flatten(),
            nn.Linear(128, 1),
        )

    def dataset(self, site: str, source: Source) -> XRays:
        x, y = images("train")
        order = public_generator(2026, "pneumonia").permutation(len(x))
        size = len(x) // len(SITES)
        own = order[SITES.index(site) * size :][:size]
        return XRays(x[own], y[own], round(len(own) * (1.0 - VALIDATION)))

    def pooled(self, parts: Sequence[Dataset]) -> Dataset:
        raise ValueError("this workload has no pooled arm")

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(1), y)

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        return {"accuracy": ((model(x).squeeze(1) > 0) == (y > 0)).float()}


@torch.no_grad()
def scores(tensors: dict[str, Tensor]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The released network's score of each test image, and whether it shows pneumonia."""
    x, y = images("test")
    model = PneumoniaTask().build_model()
    model.load_state_dict(tensors)
    return model(x).squeeze(1).double().numpy(), y.numpy() > 0


def auroc(score: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """The area under the ROC curve: how often a sick patient scores above a healthy one, ties as half."""
    from scipy.stats import rankdata

    sick = int(positive.sum())
    ranks = rankdata(score)[positive].sum()
    return float((ranks - sick * (sick + 1) / 2) / (sick * (len(score) - sick)))


def interval(score: Floats, positive: npt.NDArray[np.bool_], replicates: int = 500) -> tuple[float, float]:
    """The 95 % interval of the AUROC over resampled test patients."""
    random = public_generator(2026, "bootstrap")
    drawn = (random.integers(len(score), size=len(score)) for _ in range(replicates))
    low, high = np.quantile([auroc(score[rows], positive[rows]) for rows in drawn], [0.025, 0.975])
    return float(low), float(high)

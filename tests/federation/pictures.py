"""A toy task of tiny images, one or two a patient, whose network holds the amplitudes that a method asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.toys import toy_study
from wardround.models.spectrum import with_spectrum
from wardround.study.methods import Spectrum
from wardround.tasks.task import MetricSpec, Source, Split
from wardround.wire.random import public_generator

SIZE = 8


@dataclass(frozen=True, eq=False)
class Shown:
    """images: (B, 1, SIZE, SIZE); y: (B, 1)."""

    images: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Two images a patient; the last four patients validate and test."""

    images: Tensor
    y: Tensor
    train: int

    def fingerprint(self) -> str:
        import hashlib

        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return 2 * self.train

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> Shown:
        rows = list(indices)
        return Shown(self.images[rows], self.y[rows])

    def owners(self) -> list[int]:
        return [index // 2 for index in range(len(self))]

    def patients(self, split: Split) -> int:
        return self.train if split == "train" else 2

    def evaluation(self, split: Split) -> Iterator[tuple[int, Shown]]:
        first = {"train": 0, "validation": self.train, "test": self.train + 2}[split]
        for patient in range(first, first + self.patients(split)):
            yield patient, Shown(self.images[2 * patient : 2 * patient + 2], self.y[2 * patient : 2 * patient + 2])


class Looking(nn.Module):
    """A convolution and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.layer(x)).mean((2, 3)))
        return found


@dataclass(frozen=True)
class Pictures:
    """A number that an image's brightness says; sites differ in contrast and in how many patients they have."""

    sites: tuple[str, ...] = ("A", "B", "C")
    mean: bool = False
    bank: int = 0
    patients: int = 9

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        return (MetricSpec("r", -100.0, 100.0, 1e-6, True),)

    def build_model(self) -> nn.Module:
        asked = Spectrum(self.mean, self.bank) if self.mean or self.bank else None
        return with_spectrum(Looking(), asked, 1, (SIZE, SIZE), self.sites)

    def dataset(self, site: str, source: Source) -> PictureSet:
        random = public_generator(5, site, "pictures")
        patients = self.patients + 2 * (ord(site) - ord("A"))
        contrast = 0.5 + 0.5 * (ord(site) - ord("A"))
        y = random.standard_normal((2 * patients, 1)).astype(np.float32)
        images = contrast * (y[:, :, None, None] + random.standard_normal((2 * patients, 1, SIZE, SIZE)))
        return PictureSet(torch.from_numpy(images.astype(np.float32)), torch.from_numpy(y), patients - 4)

    def pooled(self, parts: Sequence[Any]) -> Any:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Shown) -> Tensor:
        return (model(batch.images) - batch.y).square().mean()

    def score(self, model: nn.Module, batch: Shown) -> dict[str, Tensor]:
        return {"r": -(model(batch.images) - batch.y).square().squeeze(1)}


def make_pictures(**options: Any) -> Pictures:
    """The factory that studies of it name."""
    return Pictures(**{**options, **({"sites": tuple(options["sites"])} if "sites" in options else {})})


def picture_study(method: Mapping[str, Any], options: Mapping[str, Any], **changes: Any) -> Any:
    """A study whose updates are so fine that only the method is measured."""
    values: dict[str, Any] = {
        "task": {"kind": "custom", "factory": "tests.federation.pictures:make_pictures", "options": dict(options)},
        "method": dict(method),
        "local": {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": 0.1},
        "schedule": {"rounds": 3, "keep": 4},
        "protection": {"max_sites": 4, "max_weight": 64.0, "initial_scale": 4.0},
    }
    return toy_study(**{**values, **changes})

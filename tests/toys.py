"""A task that trains in milliseconds: small enough for laws and faults, with everything a real one has."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile
from wardround.tasks.task import Dataset, MetricSpec, Source, Split
from wardround.wire.random import public_generator


@dataclass(frozen=True)
class Points:
    """Pairs (x, y) of one site; a patient has two of them. Validation and test patients follow the training ones."""

    x: Tensor
    y: Tensor
    splits: dict[str, list[int]]
    name: str

    def fingerprint(self) -> str:
        import hashlib

        return hashlib.sha256(self.x.numpy().tobytes() + self.y.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return 2 * len(self.splits["train"])

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = [2 * self.splits["train"][i // 2] + i % 2 for i in indices]
        return self.x[rows], self.y[rows]

    def owners(self) -> list[int]:
        return [self.splits["train"][i // 2] for i in range(len(self))]

    def patients(self, split: Split) -> int:
        return len(self.splits[split])

    def evaluation(self, split: Split) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        for patient in self.splits[split]:
            rows = slice(2 * patient, 2 * patient + 2)
            yield patient, (self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Union:
    """Several sites' points behind one another."""

    parts: tuple[Points, ...]

    def fingerprint(self) -> str:
        return "+".join(part.fingerprint() for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = []
        for index in indices:
            for part in self.parts:
                if index < len(part):
                    rows.append(part.batch([index], random))
                    break
                index -= len(part)
        return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])

    def owners(self) -> list[int]:
        return [1000 * number + owner for number, part in enumerate(self.parts) for owner in part.owners()]

    def patients(self, split: Split) -> int:
        return sum(part.patients(split) for part in self.parts)

    def evaluation(self, split: Split) -> Iterator[tuple[int, Any]]:
        numbered = (batch for part in self.parts for _, batch in part.evaluation(split))
        return iter(enumerate(numbered))


class Hold:
    """Lets a process that its environment tells so stop in the middle of training for as long as a file exists.

    Whoever wants to hit a run at work need not be quicker than it is.
    """

    VARIABLE = "WARDROUND_TEST_HOLD"
    # The first site, of two steps, has answered.
    STEP = 3
    steps = 0

    @classmethod
    def step(cls) -> None:
        """A step of training."""
        cls.steps += 1
        file = os.environ.get(cls.VARIABLE)
        if file is None or cls.steps < cls.STEP:
            return
        while Path(file).exists():
            Path(file).with_suffix(".reached").touch()
            time.sleep(0.01)


class Half(nn.Sequential):
    """Layers of 16 bits between an input and an output of 32."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x.bfloat16())
        return found.float()


@dataclass(frozen=True)
class Regression:
    """y = tanh(W x) with site-specific shifts.

    `norm` adds a batch-norm layer; `half` makes the layers in bfloat16; `fail` names a site that raises, `nan` one
    whose targets are no numbers; `pause` are the seconds that every loss takes.
    """

    features: int = 6
    patients: int = 8
    norm: bool = False
    half: bool = False
    fail: str = ""
    nan: str = ""
    pause: float = 0.0

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        return (MetricSpec("r", -100.0, 100.0, 1e-6, True), MetricSpec("mse", 0.0, 100.0, 1e-6, False))

    def build_model(self) -> nn.Module:
        if self.half:
            return Half(nn.Linear(self.features, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
        layers: list[nn.Module] = [nn.Linear(self.features, 8)]
        if self.norm:
            layers.append(nn.BatchNorm1d(8))
        return nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 1))

    def dataset(self, site: str, source: Source) -> Points:
        random = public_generator(5, site, "toy")
        changed = source[0] / "changed"
        shift = 0.1 * sum(map(ord, site)) % 1.0 + (1.0 if changed.exists() else 0.0)
        x = torch.from_numpy(random.standard_normal((2 * self.patients, self.features)).astype(np.float32))
        y = torch.tanh(x.sum(dim=1, keepdim=True) * 0.5 + shift)
        if site == self.nan:
            y = y * torch.nan
        order = list(range(self.patients))
        return Points(x, y, {"train": order[:-4], "validation": order[-4:-2], "test": order[-2:]}, site)

    def pooled(self, parts: Sequence[Dataset]) -> Union:
        return Union(tuple(p for p in parts if isinstance(p, Points)))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        time.sleep(self.pause)
        Hold.step()
        return (model(x) - y).square().mean()

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        error = (model(x) - y).square().squeeze(1)
        return {"r": -error, "mse": error}


class FailingRegression(Regression):
    """Raises in the training of one site."""

    def dataset(self, site: str, source: Source) -> Points:
        points = super().dataset(site, source)
        if site == self.fail:
            raise RuntimeError(f"cannot read {source[0]}/DOE^JANE_19600101.nii.gz")
        return points


def make_task(**options: Any) -> Regression:
    """The factory that toy studies name."""
    return FailingRegression(**options) if options.get("fail") else Regression(**options)


def toy_study(sites: Sequence[str] | Mapping[str, Any] = ("A", "B", "C"), **changes: Any) -> Study:
    """A study of the toy task; `sites` may say more of each than its name, `changes` replace top-level parts."""
    values: dict[str, Any] = {
        "name": "toy",
        "seed": 3,
        "sites": dict(sites) if isinstance(sites, Mapping) else {name: {} for name in sites},
        "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {}},
        "local": {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": 0.1},
        "schedule": {"rounds": 4},
    }
    return Study.model_validate({**values, **changes})


def toy_sites(folder: Path, sites: Sequence[str] = ("A", "B", "C")) -> SitesFile:
    """A sites file with an empty folder for each site, on a machine where a study may name any code: the toys."""
    for name in sites:
        (folder / name).mkdir(parents=True, exist_ok=True)
    return SitesFile(sites={name: SiteData(data=folder / name) for name in sites}).with_code()

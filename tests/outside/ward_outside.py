"""A package outside: a method, model, task, acquisition, baseline and engine of its own, found by entry points alone.

Tests make it importable under its own name (`tests.laws.test_outside`); it imports nothing of `tests`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from wardround.engines.local import LocalEngine
from wardround.engines.registry import Carried, Sites
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.learning.methods.method import LocalRound, Method
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.baselines import Baseline
from wardround.study.methods import WeightedSettings
from wardround.study.models import ModelSettings
from wardround.study.tasks import Modality, TaskSettings
from wardround.tasks.task import MetricSpec, ReportPart, Source, Split
from wardround.wire.message import Message


@dataclass(frozen=True)
class Clipped(Method):
    """Clips each step's gradient at the site."""

    limit: float = 1.0

    def gradients(self, local: LocalRound) -> None:
        for tensor in local.trainable().values():
            assert tensor.grad is not None
            tensor.grad.clamp_(-self.limit, self.limit)


class ClippedSettings(WeightedSettings):
    """FedAvg with clipped gradients."""

    kind: Literal["clipped"]
    limit: float = Field(0.5, gt=0.0)

    def build(self, protocols: Mapping[str, Any]) -> Clipped:
        return Clipped(self.weights, limit=self.limit)

    def describe(self) -> str:
        return f"clipped, gradients within {self.limit:g}"


class Scale(nn.Module):
    """The initial image times a learned number."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        return operator.initial(data) * self.factor


class ScaleSettings(ModelSettings):
    """One number."""

    kind: Literal["scale"]
    start: float = 0.5

    def build(self, modality: Modality) -> Scale:
        return Scale(self.start)

    def describe(self) -> str:
        return f"scale, one number from {self.start:g} on"


class Sampled(LinearOperator):
    """A camera that sees some pixels and no others: y = mask x."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)

    @property
    def data_shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)

    def A(self, x: Tensor) -> Tensor:
        return self.mask * x

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.mask * y


class SampledSettings(AcquisitionSettings):
    """Each patient is seen through holes of their own."""

    modality = "camera"
    baselines = ("tv", "filled")
    inside = "face"

    kind: Literal["sampled"]
    share: float = Field(0.5, gt=0.0, le=1.0)
    noise: float = Field(0.01, ge=0.0)

    @property
    def varies(self) -> bool:
        return True

    def operator(self, shape: tuple[int, int], random: np.random.Generator) -> Sampled:
        return Sampled(torch.from_numpy(random.random(shape) < self.share).float())

    def measure(self, operator: Sampled, image: Tensor, random: np.random.Generator) -> Tensor:
        noise = torch.from_numpy(random.normal(0.0, self.noise, tuple(image.shape)).astype(np.float32))
        return operator.A(image + noise)

    def read(self, raw: np.ndarray[Any, Any]) -> tuple[Sampled, Tensor]:
        return Sampled(torch.from_numpy(raw != 0).float()), torch.from_numpy(raw.astype(np.float32))[None]

    def describe(self) -> str:
        return f"{self.share:.0%} of all pixels, noise {self.noise:g}"


def fill(operator: LinearOperator, data: Tensor, width: float | None) -> Tensor:
    """Each pixel as the mean of those that are seen in a square of `width` pixels around it."""
    assert width is not None
    seen = operator.A(torch.ones_like(data))
    total, count = (nn.functional.avg_pool2d(x, int(width), 1, int(width) // 2) for x in (data, seen))
    return total / count.clamp_min(1e-6)


FILLED = Baseline("Filled <b>", "holes filled with the mean around them, nothing learned", fill, (3.0, 5.0))


@dataclass(frozen=True)
class Numbers:
    """A site's numbers: y = 3 x, a patient a row."""

    x: Tensor
    splits: Mapping[str, tuple[int, ...]]

    def fingerprint(self) -> str:
        return f"{int(self.x.sum() * 1e6):064x}"

    def __len__(self) -> int:
        return len(self.splits["train"])

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> Tensor:
        return self.x[[self.splits["train"][i] for i in indices]]

    def owners(self) -> Sequence[int]:
        return self.splits["train"]

    def patients(self, split: Split) -> int:
        return len(self.splits[split])

    def evaluation(self, split: Split) -> Iterator[tuple[int, Tensor]]:
        for patient in self.splits[split]:
            yield patient, self.x[patient : patient + 1]


@dataclass(frozen=True)
class Tripling:
    """Learns y = 3 x; its metric is how far off it is."""

    patients: int
    metrics: tuple[MetricSpec, ...] = (MetricSpec("off", 0.0, 10.0, 1e-6, False, "Off by"),)

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def dataset(self, site: str, source: Source) -> Numbers:
        x = torch.linspace(0.5, 1.5, self.patients).unsqueeze(1) * (1 + 0.1 * len(site))
        order = tuple(range(self.patients))
        third = self.patients // 3
        return Numbers(x, {"train": order[:third], "validation": order[third : 2 * third], "test": order[2 * third :]})

    def pooled(self, parts: Sequence[Numbers]) -> Numbers:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 3.0 * batch).square().mean()

    def report_parts(self, numbers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sequence[ReportPart]:
        found = {site: row["off"] for site, row in numbers["federated"].items() if site != "mean"}
        rows = [(site, off, None) for site, off in found.items()]
        return [ReportPart("How far <off>", "Of 3 x & more.", ("site", "off", "why"), rows)]

    def score(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"off": (model(batch) - 3.0 * batch).abs().squeeze(1)}


class TriplingSettings(TaskSettings):
    """A task without a scanner."""

    kind: Literal["tripling"]
    patients: int = Field(24, ge=3)

    def build(self, study: Any, embeddings: Mapping[str, Path]) -> Tripling:
        return Tripling(self.patients)

    def describe(self) -> str:
        return f"to triple numbers, of {self.patients} patients a site"


@dataclass
class Counting:
    """The engine of one process, with a count of what it carried."""

    inner: LocalEngine
    carried: list[str] = field(default_factory=list)

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            self.carried.append(message.header.kind)
            yield from self.inner.exchange([message])

    def close(self) -> None:
        self.inner.close()


MADE: list[Counting] = []


def counting(sites: Sites) -> Carried:
    """The entry point of `--engine counting`."""
    MADE.append(Counting(LocalEngine(sites.find)))
    return Carried(MADE[-1], 1)


def read_rawimg(path: Path) -> tuple[Any, Sequence[float], Any]:
    """Channels, mm and affine of a `.rawimg` file."""
    with np.load(path) as file:
        affine = file["affine"]
        return file["array"], [float(size) for size in np.linalg.norm(affine[:3, :3], axis=0)], affine

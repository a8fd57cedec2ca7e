"""A toy task with a metric of each kind: whether an example's value is high, and how far off a finding is.

A patient whose number is a multiple of `healthy` has no finding, and so no error of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.cohorts import Cohort
from tests.toys import Points, Regression, toy_study
from wardround.study.schema import Study
from wardround.tasks.histograms import auroc, average_precision, calibration_error
from wardround.tasks.states import Histogram, RatioOfSums
from wardround.tasks.task import MetricSpec, Source, Split

BINS = 100
_HIGH = Histogram(auroc, bins=BINS)
METRICS = (
    MetricSpec("auroc", 0.0, 1.0, 1e-6, True, "AUROC", definition="of high values", kind=_HIGH, source="high"),
    MetricSpec("auprc", 0.0, 1.0, 1e-6, True, "AUPRC", kind=replace(_HIGH, read=average_precision), source="high"),
    MetricSpec("ece", 0.0, 1.0, 1e-6, False, kind=replace(_HIGH, read=calibration_error), source="high"),
    MetricSpec("finding", 0.0, 100.0, 1e-6, False, "Error of the finding", "mm", 0.01, may_be_absent=True),
    MetricSpec("explained", 0.0, 4.0, 1e-6, False, kind=RatioOfSums(most=1e3, step=2.0**-20)),
    MetricSpec("mse", 0.0, 100.0, 1e-6, False),
)


@dataclass(frozen=True)
class Findings(Cohort):
    """Points whose batches say whether their patient has a finding."""

    healthy: int = 3

    def evaluation(self, split: Split) -> Iterator[tuple[int, Any]]:
        for patient, (x, y) in super().evaluation(split):
            finding = torch.full((len(x),), patient % self.healthy > 0)
            # One example a batch: a patient's batches add up.
            yield from ((patient, (x[i : i + 1], y[i : i + 1], finding[i : i + 1])) for i in range(len(x)))


@dataclass(frozen=True)
class KindsTask(Regression):
    """The toy regression, scored in every way; patients from 4 on validate, from `tested` on test."""

    patients: int = 40
    tested: int = 20
    healthy: int = 3

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        return METRICS

    def dataset(self, site: str, source: Source) -> Points:
        points = super().dataset(site, source)
        order = list(range(self.patients))
        file = source[0] / "tested"
        tested = [int(n) for n in file.read_text().split()] if file.exists() else order[self.tested :]
        splits = {"train": order[:4], "validation": order[4 : self.tested], "test": tested}
        return Findings(points.x, points.y, splits, site, self.healthy)

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        x, y, finding = batch
        said = model(x)
        error = (said - y).square().squeeze(1)
        return {
            "high": torch.stack((torch.sigmoid(4.0 * said), (y > 0.3).float()), dim=2),
            "finding": torch.where(finding, error, torch.nan),
            "explained": torch.stack((error, y.square().squeeze(1)), dim=1),
            "mse": error,
        }


def make_task(**options: Any) -> KindsTask:
    """The factory that these studies name."""
    return KindsTask(**options)


def kinds_study(**changes: Any) -> Study:
    """A study of three rounds at three sites of 20 test patients, 7 of them without a finding."""
    task = {"kind": "custom", "factory": "tests.kinds:make_task", "options": changes.pop("options", {})}
    return toy_study(**{"task": task, "schedule": {"rounds": 3}, **changes})


def released(task: KindsTask, path: Path) -> nn.Module:
    """A network with the values of a released model."""
    from safetensors.torch import load_file

    model = task.build_model()
    model.load_state_dict(load_file(path))
    return model.eval()


def numbers_of(task: KindsTask, model: nn.Module, points: Points, split: Split) -> dict[int, list[dict[str, Any]]]:
    """By patient the numbers of every example: score, label, error, y^2, and whether there is a finding."""
    found: dict[int, list[dict[str, Any]]] = {}
    for patient in points.splits[split]:
        for row in (2 * patient, 2 * patient + 1):
            x, y = points.x[row : row + 1], points.y[row : row + 1]
            with torch.no_grad():
                said = model(x)
            found.setdefault(patient, []).append(
                {
                    "score": float(torch.sigmoid(4.0 * said)),
                    "label": bool(y > 0.3),
                    "error": float((said - y).square()),
                    "energy": float(y.square()),
                    "finding": patient % task.healthy > 0,
                }
            )
    return found


def values_of(patients: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Every metric of patients, from its definition and one example at a time; scores count as rounded to bins."""
    examples = [one for patient in patients for one in patient]
    at = [min(int(one["score"] * BINS), BINS - 1) for one in examples]
    high, low = ([b for b, one in zip(at, examples, strict=True) if one["label"] == which] for which in (True, False))
    found = [p for p in patients if p[0]["finding"]]
    gaps = []
    for group in range(10):
        members = [i for i, b in enumerate(at) if b * 10 // BINS == group]
        expected = sum((at[i] + 0.5) / BINS for i in members)
        gaps.append(abs(sum(examples[i]["label"] for i in members) - expected))
    precision = {t: sum(h >= t for h in high) / sum(b >= t for b in at) for t in high}
    return {
        "auroc": sum((h > v) + 0.5 * (h == v) for h in high for v in low) / (len(high) * len(low)),
        "auprc": sum(precision[t] for t in high) / len(high),
        "ece": sum(gaps) / len(at),
        "finding": sum(sum(one["error"] for one in p) / len(p) for p in found) / len(found),
        "explained": sum(one["error"] for one in examples) / sum(one["energy"] for one in examples),
        "mse": sum(sum(one["error"] for one in p) / len(p) for p in patients) / len(patients),
    }

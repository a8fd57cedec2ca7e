"""The skin study of heterogeneity.py: seven diagnoses from what a frozen encoder says of each picture, made once.

A site's folder holds `features.npz`: features (n, F), labels (n,) and whose lesion each picture is (n,). Lesions are
dealt to training, validation and test from the study's seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wardround.tasks.classes import Classes
from wardround.tasks.task import MetricSpec, Source, Split
from wardround.wire.random import public_generator

FILE = "features.npz"
NAMES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
HIDDEN = 64
# Shares of the lesions that test and that validate.
TEST, VALIDATION = 0.35, 0.15
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Lesions:
    """A site's pictures: features (n, F), classes as 0 and 1 (n, K), and the rows of each lesion of a split."""

    x: Tensor
    y: Tensor
    splits: dict[Split, list[list[int]]]

    def fingerprint(self) -> str:
        """Of features and classes."""
        return hashlib.sha256(self.x.numpy().tobytes() + self.y.numpy().tobytes()).hexdigest()

    @cached_property
    def _training(self) -> list[int]:
        return [row for rows in self.splits["train"] for row in rows]

    @cached_property
    def _prior(self) -> Tensor:
        return self.y[self._training].mean(dim=0, keepdim=True)

    def __len__(self) -> int:
        return len(self._training)

    def owners(self) -> list[int]:
        """Whose each training picture is."""
        return [number for number, rows in enumerate(self.splits["train"]) for _ in rows]

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> Batch:
        """Features, classes, and the shares of the classes among training pictures."""
        return self._rows([self._training[i] for i in indices])

    def _rows(self, rows: Sequence[int]) -> Batch:
        return self.x[rows], self.y[rows], self._prior.expand(len(rows), -1)

    def patients(self, split: Split) -> int:
        """How many lesions a split has."""
        return len(self.splits[split])

    def evaluation(self, split: Split) -> Iterator[tuple[int, Batch]]:
        """Every lesion by itself."""
        for number, rows in enumerate(self.splits[split]):
            yield number, self._rows(rows)


@dataclass(frozen=True)
class FeaturesTask:
    """One hidden layer with batch norm; each source learns as if its diagnoses were equally frequent."""

    seed: int = 0
    features: int = 1280

    @property
    def classes(self) -> Classes:
        """The diagnoses."""
        return Classes(NAMES, imbalance="logit_adjusted")

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Macro AUROC first."""
        return self.classes.metrics

    def build_model(self) -> nn.Module:
        """The body, 0 to 2, and the head, 3."""
        return nn.Sequential(
            nn.Linear(self.features, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(NAMES))
        )

    def dataset(self, site: str, source: Source) -> Lesions:
        """What lies in the site's folder."""
        with np.load(source[0] / FILE) as file:
            x, labels, lesions = file["features"], file["labels"], file["lesions"]
        rows: dict[int, list[int]] = {}
        for row, lesion in enumerate(lesions):
            rows.setdefault(int(lesion), []).append(row)
        order = public_generator(self.seed, site, "lesions").permutation(sorted(rows))
        tests, validates = round(TEST * len(order)), round(VALIDATION * len(order))
        parts = np.split(order, [tests, tests + validates])
        named: tuple[Split, ...] = ("test", "validation", "train")
        return Lesions(
            torch.from_numpy(x.astype(np.float32)),
            nn.functional.one_hot(torch.from_numpy(labels).long(), len(NAMES)).float(),
            {split: [rows[int(lesion)] for lesion in part] for split, part in zip(named, parts, strict=True)},
        )

    def pooled(self, parts: Sequence[Any]) -> Any:
        """No arm of this study pools."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy with the logits shifted by the logarithm of the site's shares."""
        x, y, prior = batch
        return self.classes.loss(model(x), y, prior)

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What a lesion adds to the histograms, from all of its pictures."""
        x, y, _ = batch
        return self.classes.measured(model(x), y)


def make_task(**options: Any) -> FeaturesTask:
    """The factory that the study names."""
    return FeaturesTask(**options)


def extract(study: Path, sites: Path, weights: Path, out: Path) -> None:
    """Pass every picture of the skin study through its encoder, ImageNet's throughout, and keep what comes out.

    What is there already stays.
    """
    from wardround.runs.session import open_host
    from wardround.study.sites import load_sites

    given = load_sites(sites)
    lacking = [name for name in given.sites if not (out / name / FILE).exists()]
    if not lacking:
        return
    entries = {name: entry.model_copy(update={"start": weights}) for name, entry in given.sites.items()}
    host = open_host(study, given.model_copy(update={"sites": entries}), out / "unused", (), (), None)
    model: Any = host.model_context.model.eval()
    for site in lacking:
        features: list[npt.NDArray[np.float16]] = []
        labels: list[int] = []
        lesions: list[int] = []
        for lesion, batch in _pictures(host.dataset(site)):
            with torch.no_grad():
                x = batch.images
                for layer in model.layers():
                    x = layer(x)
            features.extend(x.mean(dim=(2, 3)).numpy().astype(np.float16))
            labels.extend(batch.labels.argmax(dim=1).tolist())
            lesions.extend([lesion] * len(x))
        (out / site).mkdir(parents=True, exist_ok=True)
        draft = out / site / "draft.npz"
        np.savez(draft, features=np.stack(features), labels=np.array(labels), lesions=np.array(lesions))
        draft.rename(out / site / FILE)


def _pictures(dataset: Any) -> Iterator[tuple[int, Any]]:
    """The pictures of every lesion, whichever part of the study it is in."""
    random, count = np.random.default_rng(0), 0
    owned: dict[int, list[int]] = {}
    for index, owner in enumerate(dataset.owners()):
        owned.setdefault(int(owner), []).append(index)
    for count, indices in enumerate(owned.values(), start=1):
        yield count, dataset.batch(indices, random)
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        for _, batch in dataset.evaluation(split):
            count += 1
            yield count, batch

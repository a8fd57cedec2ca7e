"""What is made of logits of classes: a loss, probabilities, what a patient adds to each metric, words for people.

A patient is measured once, by the mean of the probabilities of all their images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wardround.errors import DataError
from wardround.tasks.charts import Charts, confusion, reliability
from wardround.tasks.histograms import auroc, average_precision, calibration_error
from wardround.tasks.predictions import Probabilities
from wardround.tasks.states import Histogram
from wardround.tasks.task import MetricSpec
from wardround.tasks.temperature import Calibration, fitted
from wardround.wire.host import on_host

_BINS = 200
_LEAST_SHARE = 0.5 / 1000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Classes:
    """The classes of a study. `own` is what a site makes probabilities come true with.

    Logits and labels are (B, K), of the images of one patient where it says so; labels are 1 or 0 (in training NaN
    where they are not known), and one that an image of a patient has, the patient has. `prior` (B, K) is the share of
    each class among the training examples.
    """

    names: tuple[str, ...]
    multi_label: bool = False
    imbalance: str = "none"
    own: Calibration | None = None

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Macro AUROC first."""
        return classification_metrics(self.names, self.multi_label)

    def loss(self, logits: Tensor, labels: Tensor, prior: Tensor) -> Tensor:
        """See `diagnosis_loss`."""
        return diagnosis_loss(logits, labels, prior, self.imbalance, self.multi_label)

    def probabilities(self, logits: Tensor, own: Calibration | None = None) -> Tensor:
        """(B, K), of logits as a site calibrates them where it does; see `wardround.tasks.temperature`."""
        scaled = logits if own is None else logits / own.temperature
        if own is not None and own.offsets:
            scaled = scaled + scaled.new_tensor(own.offsets)
        return torch.sigmoid(scaled) if self.multi_label else torch.softmax(scaled, dim=1)

    def measured(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What one patient adds to the histograms, from all of the patient's images: (1, classes, 2) each.

        Where the site has no calibration, no label of a scaled probability is known.
        """
        labels = labels.amax(dim=0, keepdim=True)
        scores = self.probabilities(logits).mean(dim=0, keepdim=True)
        if self.multi_label:
            hits = (scores > 0.5).float()
        else:
            hits = torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
        scaled, right = self._confidence(self.probabilities(logits, self.own).mean(dim=0, keepdim=True), labels)
        pairs = {
            "probability": (scores, labels),
            "hit": (hits, labels),
            "confidence": self._confidence(scores, labels),
            "scaled": (scaled, torch.full_like(right, math.nan) if self.own is None else right),
        }
        return {name: torch.stack(pair, dim=-1) for name, pair in pairs.items()}

    def unknown(self) -> dict[str, Tensor]:
        """What a patient adds of whom nothing is known: scores without labels."""
        nothing = torch.full((1, len(self.names), 2), math.nan, dtype=torch.float64)
        sure = nothing if self.multi_label else nothing[:, :1]
        return {"probability": nothing, "hit": nothing, "confidence": sure, "scaled": sure}

    def _confidence(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (1, K) that are to come true, and whether they do: of the likeliest class, or of every one."""
        if self.multi_label:
            return scores, labels
        best = scores.argmax(dim=1, keepdim=True)
        return scores.gather(1, best), labels.gather(1, best)

    # A calibration at each site ---------------------------------------------------------------------------------------

    def calibration(self, patients: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Calibration | None:
        """What fits logits of validation patients, with labels and prior of each one's images; None if none does."""
        logits, labels = [], []
        offsets: tuple[float, ...] = ()
        for of_patient, shown, prior in patients:
            offsets = self._offsets(prior)
            logits.append(on_host(of_patient).astype(np.float64))
            labels.append(on_host(shown.amax(dim=0)).astype(np.float64))
        return fitted(logits, np.array(labels), offsets, multi_label=self.multi_label)

    def _offsets(self, prior: Tensor) -> tuple[float, ...]:
        """What training took out of the logits: the log of each class's share at the site, or of its odds."""
        if self.imbalance == "none":
            return ()
        share = on_host(floored(prior[0])).astype(np.float64)
        return tuple(map(float, np.log(share / (1.0 - share) if self.multi_label else share)))

    def calibrated(self, own: Calibration) -> Classes:
        """The same with a site's calibration. Raises DataError for one of other classes."""
        if len(own.offsets) not in (0, len(self.names)):
            raise DataError("the calibration beside the model is of another model; evaluate the run again")
        return replace(self, own=own)

    # What is shown ----------------------------------------------------------------------------------------------------

    def charts(self, rows: Mapping[str, Floats]) -> Charts:
        """See `wardround.tasks.task.Charted`; without a matrix of classes where a patient can have several."""
        called = rows["balanced_accuracy"]
        known = ~np.isnan(called).any(axis=(1, 2, 3))
        return Charts(
            confusion=None if self.multi_label else confusion(called[known], self.names),
            before=reliability(np.nansum(rows["ece"], axis=0)),
            after=reliability(np.nansum(rows["ece_scaled"], axis=0)),
        )

    def merit(self, rows: Mapping[str, Floats]) -> Floats:
        """The mean over classes of the probability of what is true, the class or its absence."""
        counts = rows["auroc"]
        centres = (np.arange(counts.shape[-1]) + 0.5) / counts.shape[-1]
        right = (counts[:, :, 1] @ centres + counts[:, :, 0] @ (1.0 - centres)).mean(axis=1)
        return np.asarray(right)

    def caption(self, labels: Tensor, logits: Tensor | None) -> str:
        """A patient's classes, or those that a network finds with their probabilities."""
        if logits is None:
            drawn = on_host(labels.amax(dim=0))
            return ", ".join(name for name, has in zip(self.names, drawn, strict=True) if has)
        scores = on_host(self.probabilities(logits).mean(dim=0))
        named = [k for k in range(len(scores)) if scores[k] > 0.5] if self.multi_label else [scores.argmax()]
        return ", ".join(f"{self.names[k]} {scores[k]:.2f}" for k in named)

    def said(self, logits: Tensor) -> Probabilities:
        """How likely each class is of images that are one, by the mean of their probabilities."""
        values = on_host(self.probabilities(logits, self.own).mean(dim=0)).astype(np.float64)
        return Probabilities(self.names, values, not self.multi_label)


def sensitivity(counts: Floats) -> Floats:
    """The share of a class's patients that were called it: counts (..., classes, 2, 2) -> (..., classes)."""
    positive = counts[..., 1, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(positive[..., -1] / positive.sum(axis=-1))


def classification_metrics(classes: Sequence[str], multi_label: bool = False) -> tuple[MetricSpec, ...]:
    """AUROC, balanced accuracy, average precision and calibration error, macro; then AUROC and sensitivity by class."""
    number = len(classes)
    scores, hits = partial(Histogram, classes=number, bins=_BINS), partial(Histogram, classes=number, bins=2)
    sure = partial(Histogram, classes=number if multi_label else 1, bins=_BINS)

    def spec(name: str, label: str, definition: str, kind: Histogram, source: str, larger: bool = True) -> MetricSpec:
        return MetricSpec(name, 0.0, 1.0, 1e-4, larger, label, "", 0.005, definition, True, kind, source)

    area = "share of pairs of a patient with and one without the class in which the former has the higher probability"
    apart = "expected difference of the likeliest class's probability and the share in whom it is right, in 10 bins"
    called = "share of the class's patients in whom it is the likeliest class"
    macro = (
        spec("auroc", "AUROC", f"{area}; mean of the classes", scores(auroc), "probability"),
        spec("balanced_accuracy", "Balanced accuracy", f"{called}; mean of the classes", hits(sensitivity), "hit"),
        spec("auprc", "AUPRC", "average precision, mean of the classes", scores(average_precision), "probability"),
        spec("ece", "Calibration error", apart, sure(calibration_error), "confidence", larger=False),
        spec("ece_scaled", "Calibration error after scaling", f"{apart}; of probabilities as each site calibrates them "
             "on its own patients", sure(calibration_error), "scaled", larger=False),
    )  # fmt: skip
    by_class = [
        part
        for k, name in enumerate(classes)
        for part in (
            spec(f"auroc_{name}", f"AUROC of {name}", area, scores(auroc, only=k), "probability"),
            spec(f"sensitivity_{name}", f"Sensitivity for {name}", called, hits(sensitivity, only=k), "hit"),
        )
    ]
    return (*macro, *by_class)


def floored(prior: Tensor) -> Tensor:
    """Shares of classes; one without an example counts as half an example in 1,000."""
    return prior.clamp(_LEAST_SHARE, 1.0 - _LEAST_SHARE)


def diagnosis_loss(logits: Tensor, labels: Tensor, prior: Tensor, imbalance: str, multi_label: bool) -> Tensor:
    """logits, labels and prior (B, K) -> scalar.

    `weighted` weighs a class by 1 / (K prior) (binary: its positives by (1 - prior) / prior); `logit_adjusted` adds
    log prior to the logits (Menon et al., ICLR 2021). A class without a training example at the site has no weight, and
    the least prior of half an example. Labels that are not known are NaN, and count 0 in the mean.
    """
    share, known = floored(prior), torch.where(labels.isnan(), 0.0, 1.0)
    labels = torch.where(labels.isnan(), 0.0, labels)
    if multi_label:
        weight = (1.0 - share) / share if imbalance == "weighted" else torch.ones_like(share)
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (each * (labels * weight + 1.0 - labels) * known).mean()
    if imbalance == "logit_adjusted":
        logits = logits + share.log()
    each = -(torch.log_softmax(logits, dim=1) * labels).sum(dim=1)
    if imbalance != "weighted":
        return each.mean()
    weight = (labels / (share * labels.shape[1])).sum(dim=1)
    return (each * weight).sum() / weight.sum().clamp_min(1e-12)

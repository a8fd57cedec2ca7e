"""A network goes on learning from the measured samples of one scan, before it reconstructs that scan.

Zero-shot self-supervised learning (ZS-SSL; Yaman, Hosseini & Akcakaya, ICLR 2022, arXiv:2102.07737), begun with a
trained network. The measured samples Omega of a slice are split in three parts that share none: Gamma is set apart
once, and no step sees it; in each step what is left is split anew in Theta, of which the network makes an image (its
input and its data consistency), and Lambda, which the loss is of. How well an image of Theta and Lambda predicts Gamma
says when to stop, and which step's values are taken: where none is better, those of step 0, the network's own.

Where a scan is of lines, whole lines are set apart and held out, which is ours: single samples, as in the paper, are
easy to predict from others of their lines. Networks became better at that and worse at lines that were not measured,
which an image needs (docs/self-supervision.md has the figures).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.mri.split import of_lines, outside_centre
from wardround.study.supervision import Supervision
from wardround.tasks.mri import MRIBatch, SplitBatch
from wardround.wire.host import on_host

#: Steps that can be asked for, and slices of a volume that are learned from: they bound what a scan costs.
MOST_STEPS, MOST_SLICES = 1000, 4
# Gamma's share of what was measured outside the calibration centre, as in the paper, and the least there in a slice.
_APART, _FEWEST, _FEWEST_LINES = 0.2, 100, 5
_RATE = 5e-4  # of Adam, as in the paper
# Steps between two errors of Gamma, and errors in a row that are no better after which the steps end.
_EVERY, _PATIENCE = 5, 5


@dataclass(frozen=True)
class ScanFit:
    """What became of a network on one scan.

    `steps` were taken, of at most `asked`, on `slices` slices; the values after step `kept` are used, 0 being the
    network as it was. `before` and `after` are the errors of Gamma with the network as it was and with the values that
    are used: half of `kspace_loss`, the mean over slices; 0 is perfect, 1 is predicting nothing.
    """

    asked: int
    steps: int
    kept: int
    slices: int
    before: float
    after: float

    @property
    def changed(self) -> bool:
        """Whether other values than the network's own are used."""
        return self.kept > 0

    def to_json(self) -> dict[str, int | float | bool]:
        """For programs."""
        return {"changed": self.changed, **asdict(self)}

    @property
    def label(self) -> str:
        """What a file says of its image, in less than 80 letters; nothing of one of the network as it was."""
        return f"Network adapted to this scan: step {self.kept} of {self.steps}" if self.changed else ""

    @property
    def said(self) -> str:
        """For people."""
        taken = f"{self.steps} step{'s' if self.steps != 1 else ''} on {self.slices} slice"
        taken += "s" if self.slices != 1 else ""
        if not self.changed:
            return (
                f"Adapted to this scan: no. None of {taken} predicted samples that were set apart better than the "
                f"released network does (error {self.before:.4f}), so its values are used."
            )
        return (
            f"Adapted to this scan: {taken}, of which step {self.kept} is used. Error of samples that were set apart: "
            f"{self.before:.4f} before, {self.after:.4f} after, which does not say that the image is better. It is not "
            "one of the released network: compare both."
        )


@dataclass(frozen=True)
class SliceInThree:
    """One slice in three parts: Gamma is `apart.held`, and `how` splits what is left, in lines where it is of lines."""

    apart: SplitBatch
    how: Supervision

    @classmethod
    def of(cls, slice_: MRIBatch, how: Supervision, random: np.random.Generator) -> SliceInThree:
        """Set Gamma apart of a batch of one. Raises GeometryError where too little lies outside the centre."""
        mask = on_host(slice_.mask[0])
        free, lines = outside_centre(mask), of_lines(mask)
        found, fewest, what = (free.any(0), _FEWEST_LINES, "lines") if lines else (free, _FEWEST, "samples")
        if mask.all():
            raise GeometryError(
                "the scan is fully sampled: a network learns nothing from it that it lacks; leave out --adapt-to-scan"
            )
        if (count := int(found.sum())) < fewest:
            raise GeometryError(
                f"{count} {what} of a slice were measured outside its calibration centre, and {fewest} or more are "
                "needed to set some of them apart"
            )
        how = how.model_copy(update={"held": "lines" if lines else "samples"})
        apart = SplitBatch.drawn(slice_, how.model_copy(update={"share": _APART}), random)
        return cls(apart, how)

    def loss(self, network: nn.Module, random: np.random.Generator) -> Tensor:
        """What a step lowers: `SplitBatch.learned_loss` of a Lambda that is drawn anew; scalar."""
        return SplitBatch.drawn(self.apart.seen, self.how, random).learned_loss(network).sum()

    def error(self, network: nn.Module) -> float:
        """How badly the image of all samples but Gamma predicts Gamma: half of `kspace_loss`."""
        with torch.no_grad():
            loss = self.apart.held_out_loss(self.apart.image_of_seen(network))
        return float(on_host(loss.sum())) / 2


def fit_to_scan(
    network: nn.Module,
    slices: Sequence[MRIBatch],
    how: Supervision,
    steps: int,
    random: np.random.Generator,
    *,
    rate: float = _RATE,
) -> tuple[nn.Module, ScanFit]:
    """A network fitted to slices (each a batch of one) of a scan by at most `steps` steps of Adam, and what was done.

    The network that is given stays as it is, and is given back where no step is better. Its normalisation and dropout
    are those of evaluation, and only values that gradients reach change. Raises GeometryError where a slice has too few
    samples to split, and StudyError where the network has no value to train.
    """
    parts = [SliceInThree.of(slice_, how, random) for slice_ in slices]
    fitted = copy.deepcopy(network).eval()
    values = [value for value in fitted.parameters() if value.requires_grad]
    if not values:
        raise StudyError("nothing of this network is trained: all its values are frozen")
    optimizer = torch.optim.Adam(values, lr=rate, foreach=True)

    def error() -> float:
        return fmean(part.error(fitted) for part in parts)

    before = least = error()
    best, kept, worse, taken = [value.detach().clone() for value in values], 0, 0, 0
    while taken < steps and worse < _PATIENCE:
        optimizer.zero_grad(set_to_none=True)
        loss = parts[taken % len(parts)].loss(fitted, random)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        taken += 1
        if taken % _EVERY and taken < steps:
            continue
        found = error()
        if not math.isfinite(found):
            break
        worse += 1
        if found < least:
            least, kept, worse = found, taken, 0
            best = [value.detach().clone() for value in values]
    done = ScanFit(steps, taken, kept, len(parts), before, least)
    if not done.changed:
        return network, done
    with torch.no_grad():
        for value, chosen in zip(values, best, strict=True):
            value.copy_(chosen)
    return fitted, done

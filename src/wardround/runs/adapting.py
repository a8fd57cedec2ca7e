"""Adapts a released network to the scan that it is about to reconstruct: what is asked for, and of which slices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.learning.scan_fit import MOST_SLICES, MOST_STEPS, ScanFit, fit_to_scan
from wardround.runs.depth import Scan, spread
from wardround.study.schema import Study
from wardround.study.supervision import Supervision
from wardround.study.tasks import ReconstructionTask
from wardround.tasks.mri import MRIBatch
from wardround.wire.random import public_generator


def checked_steps(study: Study, steps: int) -> int:
    """The steps that were asked for. Raises `StudyError` where the model of a study cannot be adapted to a scan."""
    if not study.scanner.splits:
        raise StudyError(
            f"--adapt-to-scan splits samples of MRI on a Cartesian grid, and this model's scanner is "
            f"{study.scanner.kind}; leave it out"
        )
    if not study.model.consistent:
        raise StudyError(
            f"--adapt-to-scan: the network {study.model.kind} does not hold its images to the measured samples, so it "
            "cannot learn from those of one scan; leave it out"
        )
    if not 1 <= steps <= MOST_STEPS:
        raise StudyError(f"--adapt-to-scan is a number of steps from 1 to {MOST_STEPS}; got {steps}")
    return steps


def splitting(study: Study, site: str | None) -> Supervision:
    """How samples are split: as the study does, or the site, where it learns from split samples; else by default."""
    assert isinstance(study.task, ReconstructionTask)
    how = study.task.supervision if site is None else study.supervision_of(site)
    return how if how.splits else Supervision(kind="split")


def adapted(
    network: nn.Module, scans: Sequence[Scan], how: Supervision, steps: int, seed: int
) -> tuple[nn.Module, ScanFit | None]:
    """A network adapted to the slices of a volume, of which a few with a signal are learned from, evenly spread.

    What is drawn is public randomness of the study's seed: the same file gives the same image. Without a signal in any
    slice it is the network as it was. Raises `StudyError` where a slice has too few samples to be split.
    """
    slices = []
    for number in spread(scans, MOST_SLICES):
        operator, data = scans[number]()
        assert isinstance(operator, CartesianMRI)
        slices.append(MRIBatch.measured(operator, data))
    if not slices:
        return network, None
    try:
        return fit_to_scan(network, slices, how, steps, public_generator(seed, "adapt to scan"))
    except GeometryError as error:
        raise StudyError(f"--adapt-to-scan: {error}; leave it out for this scan") from error

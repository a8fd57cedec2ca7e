"""Applies a released model of an acquisition's own operator: to magnitude images, scanned first, or to its raw data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wardround.errors import DataError, StudyError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.readers.raw.arrays import read_array
from wardround.imaging.readers.volume import Volume, read_volume
from wardround.runs.apply import peak_of, score_of, slices_said
from wardround.runs.apply_ct import Done, save_nifti
from wardround.runs.depth import Scan, Score, chosen, look, total_variation
from wardround.runs.protocols import Facts
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.schema import Study
from wardround.wire.random import public_generator


@dataclass(frozen=True)
class Given:
    """The scans of a volume on the scale of training, the scale, where the volume lies, and what is known of it."""

    scans: Sequence[Scan]
    scale: float
    like: Volume
    said: str
    facts: Facts
    score: Score | None = None


@dataclass(frozen=True)
class RawReader:
    """How an acquisition reads raw data: whether a path is such a file, what it takes, for people, and the reader."""

    takes: Callable[[Path], bool]
    said: str
    read: Callable[[AcquisitionSettings, Path], Given]


def reconstruct_general(
    network: nn.Module,
    study: Study,
    source: Path,
    output: Path,
    site: str | None,
    prompt: Tensor | None = None,
    dose: float | None = None,
    fallback: bool = False,
    *,
    raw: RawReader | None = None,
) -> Done:
    """Reconstruct `source` slice by slice and write NIfTI to `output`.

    `source` is a magnitude image (NIfTI), which is scanned by the simulated scanner of the study, or of `site`, or raw
    data: what the reader `raw` takes, by default .npy, (slices, ...), of which the acquisition reads each slice. With
    `fallback` it is total variation's image where the network is out of its depth. Raises `DataError` for an input that
    cannot be used, `StudyError` for a choice that does not fit.
    """
    raw = raw or _ARRAYS
    acquisition = study.acquisition if site is None else study.acquisition_of(site)
    if not isinstance(acquisition, type(study.scanner)):
        raise StudyError(f"the study has no scanner of its own; choose a site's with --site {' | '.join(study.sites)}")
    subject = acquisition.modality.upper()
    if dose is not None:
        raise StudyError(f"--dose: this is a model for {subject}; leave it out")
    if source.is_dir() or not (source.name.endswith((".nii", ".nii.gz")) or raw.takes(source)):
        takes = f"it takes a NIfTI image, or {raw.said}"
        raise StudyError(f"this is a model for {subject}: {takes}", detail=str(source))
    if raw.takes(source):
        given = raw.read(acquisition, source)
    else:
        given = _simulated(acquisition, study, source, site or "the study")

    def again(number: int, found: Tensor) -> tuple[LinearOperator, Tensor]:
        peak = found.abs().amax().clamp_min(1e-9)
        return _scanned(acquisition, study, number, found.abs() / peak)

    classical = total_variation(study)
    depth = look(network, given.scans, classical, again, given.score)
    method = chosen(network, classical, depth, fallback)
    with torch.no_grad():
        images = [method(*each())[0].abs().numpy() * np.float32(given.scale) for each in given.scans]
    like = given.like
    save_nifti(Volume(np.stack(images, axis=-1), like.spacing, like.affine, like.space), output)
    return Done(given.said, given.facts, depth=depth)


def _scanned(
    acquisition: AcquisitionSettings, study: Study, number: int, magnitude: Tensor
) -> tuple[LinearOperator, Tensor]:
    """A slice (1, H, W), peak 1, scanned as in training; all slices by one operator."""
    of_operator = public_generator(study.seed, "reconstruct", "operator")
    random = public_generator(study.seed, "reconstruct", number)
    found: tuple[LinearOperator, Tensor] = acquisition.scanned(magnitude.clamp(0.0, 1.0), of_operator, random)
    return found


def _simulated(acquisition: AcquisitionSettings, study: Study, source: Path, whose: str) -> Given:
    image = read_volume(source)
    peak, (height, width, count) = peak_of(image, source), image.data.shape

    def scan(number: int) -> tuple[LinearOperator, Tensor]:
        magnitude = torch.from_numpy((image.data[..., number] / peak).astype(np.float32))
        return _scanned(acquisition, study, number, magnitude[None])

    said = (
        f"Simulated a scan of {slices_said((height, width), count)} by the scanner of {whose} "
        f"({acquisition.describe()}) and reconstructed it."
    )
    return Given(
        [partial(scan, number) for number in range(count)],
        peak,
        image,
        said,
        acquisition.facts(),
        score_of(image, peak),
    )


@torch.no_grad()
def _measured(acquisition: AcquisitionSettings, source: Path) -> Given:
    raw = read_array(source, "raw data")
    if raw.ndim < 2 or 0 in raw.shape:
        raise DataError(f"raw data must be (slices, ...), and these are of shape {raw.shape}")
    if not (np.issubdtype(raw.dtype, np.number) and np.isfinite(raw).all()):
        raise DataError("the raw data hold what is no finite number; replace it at the source")

    def scan(number: int, scale: float) -> tuple[LinearOperator, Tensor]:
        operator, data = acquisition.read(np.array(raw[number]))
        return operator, data / scale

    firsts = [operator.initial(data) for operator, data in (scan(number, 1.0) for number in range(len(raw)))]
    # As in training, where 1 is the maximum of the volume.
    scale = max(max(float(first.abs().amax()) for first in firsts), 1e-30)
    height, width = firsts[0].shape[-2:]
    like = Volume(np.zeros((height, width, len(raw)), np.float32), (1.0, 1.0, 1.0), np.eye(4))
    said = (
        f"Reconstructed {slices_said((height, width), len(raw))} from raw data, which hold no voxel size, so 1 mm is "
        "written."
    )
    return Given([partial(scan, number, scale) for number in range(len(raw))], scale, like, said, {})


_ARRAYS = RawReader(lambda path: path.suffix == ".npy", "raw data in .npy", _measured)

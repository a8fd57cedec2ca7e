"""Applies a released model to an image or to raw data, for a clinic that has only the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import DataError, GeometryError, StudyError
from wardround.imaging.acquisition.mri.masks import sampling_mask
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.simulate import simulate
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.readers.embeddings import Embeddings
from wardround.imaging.readers.raw import KINDS, is_raw
from wardround.imaging.readers.volume import Volume, read_volume
from wardround.learning.scan_fit import ScanFit
from wardround.models.build import build_model
from wardround.runs.adapting import adapted, checked_steps, splitting
from wardround.runs.apply_ct import Done, save_nifti
from wardround.runs.depth import Classical, Depth, Scan, Score, chosen, look, total_variation
from wardround.runs.measured import estimated_by, read_measured, scanned_again
from wardround.runs.protocols import Facts, summary, warning
from wardround.runs.releases import ReleasedModel, closed
from wardround.study.acquisition import MRIAcquisition
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.base import at
from wardround.study.schema import Study
from wardround.tasks.metrics import SSIM_WINDOW, reconstruction_scores
from wardround.wire.random import public_generator

Array = npt.NDArray[Any]
# Interpolation leaves small undershoots; anything lower is no magnitude image.
_UNDERSHOOT = 0.05


@dataclass(frozen=True)
class Reconstruction:
    """What became of one input: `said` is for people, `depth` what was found of the network there, if anything.

    `fit` says how the network was adapted to the scan, where that was asked for.
    """

    source: Path
    output: Path
    said: str
    depth: Depth | None = None
    fit: ScanFit | None = None

    @property
    def out_of_depth(self) -> bool:
        """Whether the network's image is not to be trusted."""
        return self.depth is not None and self.depth.fires

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Means of `network` and `tv` against the input, where that is an image: {"network": {"psnr": ...}, ...}."""
        return {} if self.depth is None else self.depth.scores


class Reconstructor:
    """A released model, opened once, for any number of inputs.

    An input is raw data as a scanner wrote them (`wardround.imaging.readers.raw`: fastMRI, ISMRMRD, BART, .npy, .mat),
    or a magnitude image in NIfTI, which is first scanned by the simulated scanner of the study, or of `site`, where it
    has one; a model of CT takes other files, see `wardround.runs.apply_ct.reconstruct_ct`, and one of an acquisition
    outside the raw data that it reads. `embedding` is a file with the patient's, for a model with anatomy; without it
    that model's map is neutral. `dose` is a share of the dose of measured projections to be simulated. With `fallback`,
    where the network is out of its depth (`wardround.runs.depth`) total variation's image is written instead of the
    network's. `adapt_to_scan`, of Cartesian MRI, trains a copy of the network on each scan's own measured samples
    first, by this number of steps at most (`wardround.learning.scan_fit`); the released model stays as it is. `weights`
    is the file with its frozen part, where that does not lie where the run put it. Raises `DataError` and `StudyError`.
    """

    def __init__(
        self,
        released: ReleasedModel,
        *,
        site: str | None = None,
        embedding: Path | None = None,
        dose: float | None = None,
        fallback: bool = False,
        adapt_to_scan: int | None = None,
        weights: Path | None = None,
    ) -> None:
        self._site, self._dose, self._fallback = site, dose, fallback
        study = self.study = released.study
        if study.task.kind != "reconstruction":
            raise StudyError(f"this model does not reconstruct images: its study's task is `{study.task.kind}`")
        if study.scanner.closed:
            raise closed("scanner", study.scanner.kind)
        # An acquisition whose samples cannot be split knows nothing of this.
        self._adapting = {} if adapt_to_scan is None else {"adapt_to_scan": checked_steps(study, adapt_to_scan)}
        self.release = released.used
        self._trained = released.trained_on
        self._network = released.network(lambda: build_model(study.model, study.modality), site, weights)
        self._dimension, self._prompt = self.study.model.prompt_dimension, None
        if embedding is not None:
            if self._dimension is None:
                raise StudyError("--embedding: this model takes none (its study has no model.anatomy); leave it out")
            self._prompt = torch.from_numpy(Embeddings(embedding, self._dimension, "--embedding").only())

    def __call__(self, source: Path, output: Path) -> Reconstruction:
        """Reconstruct one input. Raises `DataError`, `StudyError` and `GeometryError`."""
        if not (source.is_dir() or output.name.endswith((".nii", ".nii.gz"))):
            raise StudyError("the output must be a NIfTI file: NAME.nii.gz", detail=str(output))
        if output.exists() and source.exists() and output.samefile(source):
            raise StudyError("the output would overwrite the input; choose another name", detail=str(output))
        try:
            done: Done = at(self.study.scanner.applied)(
                self._network,
                self.study,
                source,
                output,
                self._site,
                self._prompt,
                self._dose,
                self._fallback,
                **self._adapting,
            )
        except GeometryError as error:
            # Operators and solvers know no file.
            raise GeometryError(str(error), detail=error.detail or str(source)) from error
        mind = warning(self._trained, done.scan, done.header)
        neutral = "No --embedding of the patient was given: the model's anatomy map is neutral."
        written = done.depth is not None and done.depth.fires and self._fallback
        said = (
            done.said,
            summary(self._trained),
            *([neutral] if self._dimension is not None and self._prompt is None else []),
            *done.minds,
            *([mind] if mind else []),
            *([done.fit.said] if done.fit is not None else []),
            *(done.depth.lines() if done.depth is not None else []),
            f"Wrote {output}{', the image of total variation' if written else ''}. Research use only.",
        )
        return Reconstruction(source, output, "\n".join(said), done.depth, done.fit)


def reconstruct_mri(
    network: nn.Module,
    study: Study,
    source: Path,
    output: Path,
    site: str | None,
    prompt: Tensor | None = None,
    dose: float | None = None,
    fallback: bool = False,
    adapt_to_scan: int | None = None,
) -> Done:
    """What a model of MRI makes of an input; see `Reconstructor`."""
    if dose is not None:
        raise StudyError("--dose: this is a model for MRI; leave it out")
    model = _mri_model(network, study, site)
    if source.is_dir():
        takes = f"raw data ({KINDS})" if model.acquisition.measured else f"a NIfTI image or raw data ({KINDS})"
        raise StudyError(f"this is a model for MRI: it takes files, not a folder: {takes}", detail=str(source))
    given = _measured(model, source) if is_raw(source) else _simulated(model, source, site)
    fit: ScanFit | None = None
    if adapt_to_scan is not None:
        network, fit = adapted(network, given.scans, splitting(study, site), adapt_to_scan, study.seed)
    depth = look(network, given.scans, model.classical, given.again, given.score, usual=model.network)
    method = chosen(network, model.classical, depth, fallback)
    with torch.no_grad():
        images = [method(*each())[0].abs().numpy() * np.float32(given.scale) for each in given.scans]
    like, about = given.like, fit.label if fit is not None and method is network else ""
    save_nifti(Volume(np.stack(images, axis=-1), like.spacing, like.affine, like.space), output, about)
    return Done(given.said, given.facts, depth=depth, fit=fit)


@dataclass(frozen=True)
class _Model:
    """A released network and the scanner to simulate, or that of the raw data that it was trained on."""

    network: nn.Module
    acquisition: AcquisitionSettings
    seed: int
    classical: Classical


@dataclass(frozen=True, eq=False)
class _Given:
    """An input: its scans, their scale, what is said of it, and whose grid the output has (of which no value is used).

    `again` and `score` are for `wardround.runs.depth.look`.
    """

    scans: Sequence[Scan]
    scale: float
    said: str
    facts: Facts
    like: Volume
    again: Callable[[int, Tensor], tuple[LinearOperator, Tensor]]
    score: Score | None = None


def _mri_model(network: nn.Module, study: Study, site: str | None) -> _Model:
    acquisition = study.acquisition if site is None else study.acquisition_of(site)
    if acquisition is None or acquisition.kind != study.scanner.kind:
        # The default of a study whose sites all say it themselves.
        acquisition = study.scanner
    return _Model(network, acquisition, study.seed, total_variation(study))


def _measured(model: _Model, source: Path) -> _Given:
    """Raw data. Scans to compare with are simulated where the model was trained so; else they are these, once more."""
    measured = read_measured(source, estimated_by(model.acquisition))

    def again(number: int, image: Tensor) -> tuple[LinearOperator, Tensor]:
        if isinstance(model.acquisition, MRIAcquisition):
            return _image_scanned(model, number, image)
        scan = measured.scans[number]()
        return scan[0], scanned_again(scan, image, public_generator(model.seed, "reconstruct", number))

    return _Given(
        measured.scans,
        measured.scale,
        f"Reconstructed {slices_said(measured.raw.size, len(measured.scans))} from {measured.said}",
        measured.facts,
        measured.place,
        again,
    )


def _image_scanned(model: _Model, number: int, image: Tensor) -> tuple[LinearOperator, Tensor]:
    """An image (1, H, W) that a method made of a slice, scanned as in training."""
    magnitude = image[0].abs().numpy()
    return _scanned(model, magnitude / max(float(magnitude.max()), 1e-9), number)


def _simulated(model: _Model, source: Path, site: str | None) -> _Given:
    """An image, scanned as in training."""
    acquisition = model.acquisition
    if not isinstance(acquisition, MRIAcquisition):
        raise StudyError(f"this model was trained on raw data and takes raw data: {KINDS}", detail=str(source))
    image = read_volume(source)
    peak = peak_of(image, source)
    height, width, count = image.data.shape
    mask = sampling_mask(acquisition.mask, (height, width), public_generator(model.seed, "reconstruct", "mask"))

    return _Given(
        [partial(_scanned, model, image.data[..., number] / peak, number, mask) for number in range(count)],
        peak,
        f"Simulated a scan of {slices_said((height, width), count)} by the scanner of {site or 'the study'} (R = "
        f"{acquisition.mask.acceleration:g}, {acquisition.coils} coils) and reconstructed it.",
        acquisition.facts(),
        image,
        partial(_image_scanned, model),
        score_of(image, peak),
    )


def trained_coils(study: Study, site: str | None) -> tuple[int, ...]:
    """The numbers of coils that a model of MRI, or the model of `site`, was trained with."""
    sites = (study.training_sites or tuple(study.sites)) if site is None else (site,)
    known: set[int] = set()
    for scanner in map(study.acquisition_of, sites):
        if isinstance(scanner, MRIAcquisition):
            coils = [int(value) for value in scanner.trained()["coils"]]
            known.update(range(min(coils), max(coils) + 1))
    return tuple(sorted(known))


def peak_of(volume: Volume, source: Path) -> float:
    """The maximum of a magnitude image. Raises DataError for any other image."""
    peak = float(volume.data.max())
    if peak <= 0 or float(volume.data.min()) < -_UNDERSHOOT * peak:
        raise DataError("the image has negative values, so it is no magnitude image", detail=str(source))
    return peak


def _scanned(
    model: _Model, image: Array, number: int, mask: NDArray[np.float32] | None = None
) -> tuple[CartesianMRI, Tensor]:
    """A slice, peak 1, scanned as in training."""
    clipped = np.clip(image, 0.0, 1.0).astype(np.float32)
    assert isinstance(model.acquisition, MRIAcquisition)
    measured = simulate(clipped, model.acquisition, public_generator(model.seed, "reconstruct", number), mask)
    return CartesianMRI(measured.maps[None], measured.mask[None]), measured.kspace[None]


def score_of(volume: Volume, peak: float) -> Score | None:
    """PSNR, SSIM and NMSE of a slice against what was scanned; none where it is smaller than their windows."""
    if min(volume.data.shape[:2]) < SSIM_WINDOW:
        return None

    def score(number: int, image: Tensor) -> dict[str, float]:
        target = torch.from_numpy(np.clip(volume.data[..., number] / peak, 0.0, 1.0))[None]
        values = reconstruction_scores(image.abs(), target, torch.ones_like(target))
        return {name: float(values[name]) for name in ("psnr", "ssim", "nmse")}

    return score


def slices_said(size: tuple[int, ...], count: int) -> str:
    """`3 slices of 64 x 64`."""
    return f"{count} slice{'s' if count != 1 else ''} of {size[0]} x {size[1]}"

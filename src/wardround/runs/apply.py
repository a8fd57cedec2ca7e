"""Applies a released model to an image or to raw data, for a clinic that has only the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wardround.errors import DataError, StudyError
from wardround.imaging.acquisition.mri.coils import estimate_maps
from wardround.imaging.acquisition.mri.masks import sampling_mask
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.simulate import simulate
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.readers.embeddings import Embeddings
from wardround.imaging.readers.volume import Volume, read_volume
from wardround.models.build import build_model
from wardround.runs.apply_ct import Done, save_nifti
from wardround.runs.depth import Classical, Depth, Scan, Score, chosen, look, total_variation
from wardround.runs.protocols import summary, warning
from wardround.runs.releases import ReleasedModel, closed
from wardround.study.acquisition import Maps, MRIAcquisition
from wardround.study.base import at
from wardround.study.schema import Study
from wardround.tasks.metrics import SSIM_WINDOW, reconstruction_scores
from wardround.wire.files import reason
from wardround.wire.random import public_generator

Array = npt.NDArray[Any]
# Interpolation leaves small undershoots; anything lower is no magnitude image.
_UNDERSHOOT = 0.05


@dataclass(frozen=True)
class Reconstruction:
    """What became of one input: `said` is for people, `depth` what was found of the network there, if anything."""

    source: Path
    output: Path
    said: str
    depth: Depth | None = None

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

    An input is k-space, complex (coils, H, W) or (slices, coils, H, W) in .npy with zeros where nothing was measured,
    or a magnitude image in NIfTI, which is first scanned by the simulated scanner of the study, or of `site`; a model
    of CT takes other files, see `wardround.runs.apply_ct.reconstruct_ct`, and one of an acquisition outside the raw
    data that it reads. `embedding` is a file with the patient's, for a model with anatomy; without it that model's map
    is neutral. `dose` is a share of the dose of measured projections to be simulated. With `fallback`, where the
    network is out of its depth (`wardround.runs.depth`) total variation's image is written instead of the network's.
    `weights` is the file with its frozen part, where that does not lie where the run put it. Raises `DataError` and
    `StudyError`.
    """

    def __init__(
        self,
        released: ReleasedModel,
        *,
        site: str | None = None,
        embedding: Path | None = None,
        dose: float | None = None,
        fallback: bool = False,
        weights: Path | None = None,
    ) -> None:
        self._site, self._dose, self._fallback = site, dose, fallback
        study = self.study = released.study
        if study.task.kind != "reconstruction":
            raise StudyError(f"this model does not reconstruct images: its study's task is `{study.task.kind}`")
        if study.scanner.closed:
            raise closed("scanner", study.scanner.kind)
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
        done: Done = at(self.study.scanner.applied)(
            self._network, self.study, source, output, self._site, self._prompt, self._dose, self._fallback
        )
        mind = warning(self._trained, done.scan, done.header)
        neutral = "No --embedding of the patient was given: the model's anatomy map is neutral."
        written = done.depth is not None and done.depth.fires and self._fallback
        said = (
            done.said,
            summary(self._trained),
            *([neutral] if self._dimension is not None and self._prompt is None else []),
            *done.minds,
            *([mind] if mind else []),
            *(done.depth.lines() if done.depth is not None else []),
            f"Wrote {output}{', the image of total variation' if written else ''}. Research use only.",
        )
        return Reconstruction(source, output, "\n".join(said), done.depth)


def reconstruct_mri(
    network: nn.Module,
    study: Study,
    source: Path,
    output: Path,
    site: str | None,
    prompt: Tensor | None = None,
    dose: float | None = None,
    fallback: bool = False,
) -> Done:
    """What a model of MRI makes of an input; see `Reconstructor`."""
    if dose is not None:
        raise StudyError("--dose: this is a model for MRI; leave it out")
    return _reconstruct_mri(_mri_model(network, study, site), source, output, site, fallback)


def _reconstruct_mri(model: _Model, source: Path, output: Path, site: str | None, fallback: bool) -> Done:
    if source.is_dir():
        raise StudyError("this is a model for MRI: it takes one file, a NIfTI image or k-space", detail=str(source))
    if source.suffix == ".npy":
        kspace = read_kspace(source, model.coils)
        scans, scale = measured_scans(kspace, model.acquisition.maps)
        score = None
        affine, spacing, space = np.eye(4), (1.0, 1.0, 1.0), None
        said = (
            f"Reconstructed {slices_said(kspace.shape[-2:], len(scans))} from k-space of {kspace.shape[1]} coils; "
            "k-space holds no voxel size, so 1 mm is written."
        )
        scan: dict[str, float | str] = {"acceleration": _acceleration(kspace), "coils": float(kspace.shape[1])}
    else:
        image = read_volume(source)
        scale = peak_of(image, source)
        scans, score = _simulated(model, image, scale), score_of(image, scale)
        affine, spacing, space = image.affine, image.spacing, image.space
        said = (
            f"Simulated a scan of {slices_said(image.data.shape[:2], len(scans))} by the scanner of "
            f"{site or 'the study'} (R = {model.acquisition.mask.acceleration:g}, {model.acquisition.coils} coils) and "
            "reconstructed it."
        )
        scan = model.acquisition.facts()

    def again(number: int, image: Tensor) -> tuple[LinearOperator, Tensor]:
        magnitude = image[0].abs().numpy()
        return _scanned(model, magnitude / max(float(magnitude.max()), 1e-9), number)

    depth = look(model.network, scans, model.classical, again, score)
    method = chosen(model.network, model.classical, depth, fallback)
    with torch.no_grad():
        images = [method(*each())[0].abs().numpy() * np.float32(scale) for each in scans]
    save_nifti(Volume(np.stack(images, axis=-1), spacing, affine, space), output)
    return Done(said, scan, depth=depth)


@dataclass(frozen=True)
class _Model:
    """A released network, the scanner to simulate, and the numbers of coils it was trained with."""

    network: nn.Module
    acquisition: MRIAcquisition
    coils: tuple[int, ...]
    seed: int
    classical: Classical


def _mri_model(network: nn.Module, study: Study, site: str | None) -> _Model:
    acquisition = study.acquisition if site is None else study.acquisition_of(site)
    assert isinstance(acquisition, MRIAcquisition)
    return _Model(network, acquisition, trained_coils(study, site), study.seed, total_variation(study))


def trained_coils(study: Study, site: str | None) -> tuple[int, ...]:
    """The numbers of coils that a model of MRI, or the model of `site`, was trained with."""
    sites = (study.training_sites or tuple(study.sites)) if site is None else (site,)
    found = (study.acquisition_of(name) for name in sites)
    return tuple(sorted({a.coils for a in found if isinstance(a, MRIAcquisition)}))


def read_array(source: Path, what: str) -> Array:
    """The array of a .npy file, which is called `what` in errors, mapped. Raises DataError for any other file."""
    try:
        # Mapped: a header that says more than the file holds takes no memory.
        found = np.load(source, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"the {what} file does not exist; check its path", detail=str(source)) from error
    except PermissionError as error:
        raise DataError(f"the {what} file cannot be read ({reason(error)})", detail=str(source)) from error
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"the {what} file is not a NumPy array (.npy)", detail=f"{source}: {error}") from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"the {what} file holds several arrays; store one array as .npy", detail=str(source))
    return found


def read_kspace(source: Path, coils: tuple[int, ...]) -> Array:
    """Complex64 (slices, coils, H, W) of a .npy file; raises DataError for other arrays and numbers of coils."""
    kspace = read_array(source, "k-space")
    if kspace.ndim not in (3, 4) or not np.iscomplexobj(kspace) or 0 in kspace.shape:
        raise DataError(
            "k-space must be complex, (coils, H, W) or (slices, coils, H, W); "
            f"this is {kspace.dtype} of shape {kspace.shape}"
        )
    if kspace.shape[-3] not in coils:
        known = " or ".join(map(str, coils))
        raise DataError(
            f"k-space of shape {kspace.shape} has {kspace.shape[-3]} coils, but the model was trained with {known}; "
            f"its axes must be (coils, H, W) or (slices, coils, H, W), its coils compressed to {known}"
        )
    if not np.isfinite(kspace).all():
        raise DataError("the k-space holds NaN or infinite values; replace them at the source")
    whole: Array = kspace.astype(np.complex64)
    return whole if whole.ndim == 4 else whole[None]


def _acceleration(kspace: Array) -> float:
    """All samples of a plane for each that was measured."""
    return float(1.0 / max(np.abs(kspace).sum(1).astype(bool).mean(), 1e-9))


@torch.no_grad()
def measured_scans(kspace: Array, maps: Maps = "estimated") -> tuple[list[Scan], float]:
    """The scans of a volume of k-space on one scale, and the scale: networks learn volumes whose maximum is 1.

    maps: how coil maps are estimated, see `estimate_maps`. Raises GeometryError where they cannot be.
    """

    def scan(number: int, scale: float) -> tuple[CartesianMRI, Tensor]:
        data = torch.from_numpy(kspace[number])[None]
        mask = (data.abs().sum(dim=1) > 0).float()
        return CartesianMRI(estimate_maps(data, mask, maps), mask), data / scale

    # The zero-filled peak of the volume.
    scale = max(
        float(operator.A_adjoint(data).abs().amax()) for operator, data in (scan(n, 1.0) for n in range(len(kspace)))
    )
    return [partial(scan, number, scale) for number in range(len(kspace))], scale


def peak_of(volume: Volume, source: Path) -> float:
    """The maximum of a magnitude image. Raises DataError for any other image."""
    peak = float(volume.data.max())
    if peak <= 0 or float(volume.data.min()) < -_UNDERSHOOT * peak:
        raise DataError("the image has negative values, so it is no magnitude image", detail=str(source))
    return peak


def _simulated(model: _Model, volume: Volume, peak: float) -> list[Scan]:
    height, width, count = volume.data.shape
    mask = sampling_mask(model.acquisition.mask, (height, width), public_generator(model.seed, "reconstruct", "mask"))
    return [partial(_scanned, model, volume.data[..., number] / peak, number, mask) for number in range(count)]


def _scanned(
    model: _Model, image: Array, number: int, mask: NDArray[np.float32] | None = None
) -> tuple[CartesianMRI, Tensor]:
    """A slice, peak 1, scanned as in training."""
    clipped = np.clip(image, 0.0, 1.0).astype(np.float32)
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

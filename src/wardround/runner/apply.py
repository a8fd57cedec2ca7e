"""Applies a released model to an image or to raw data, for a clinic that has only the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wardround.data.embeddings import Embeddings
from wardround.data.volume import Volume, read_volume
from wardround.errors import DataError, StudyError
from wardround.models.build import build_model
from wardround.physics.coils import low_resolution_maps
from wardround.physics.masks import sampling_mask
from wardround.physics.mri import CartesianMRI
from wardround.physics.simulate import simulate
from wardround.runner.apply_ct import Done, reconstruct_ct, save_nifti
from wardround.runner.protocols import read_protocols, simulated, summary, warning
from wardround.runner.release import load_model, personal_part, serve, study_of
from wardround.study.acquisition import MRIAcquisition
from wardround.study.models import anatomy_of
from wardround.study.protocols import ModelProtocols
from wardround.study.schema import Study
from wardround.wire.random import public_generator

Array = npt.NDArray[Any]
# Interpolation leaves small undershoots; anything lower is no magnitude image.
_UNDERSHOOT = 0.05


def reconstruct(
    model_file: Path,
    source: Path,
    output: Path,
    *,
    site: str | None = None,
    embedding: Path | None = None,
    dose: float | None = None,
) -> str:
    """Reconstruct `source` with a released model and write NIfTI to `output`; returns what was done, in a sentence.

    `source` is k-space, complex (coils, H, W) or (slices, coils, H, W) in .npy with zeros where nothing was measured,
    or a magnitude image in NIfTI, which is first scanned by the simulated scanner of the study, or of `site`; a model
    of CT takes other files, see `wardround.runner.apply_ct.reconstruct_ct`. `embedding` is a file with the patient's,
    for a model with anatomy; without it that model's map is neutral. `dose` is a share of the dose of measured
    projections to be simulated. The output appears whole or not at all.
    Raises `DataError`, `StudyError` and `GeometryError`.
    """
    if not (source.is_dir() or output.name.endswith((".nii", ".nii.gz"))):
        raise StudyError("the output must be a NIfTI file: NAME.nii.gz", detail=str(output))
    if output.exists() and source.exists() and output.samefile(source):
        raise StudyError("the output would overwrite the input; choose another name", detail=str(output))
    network, study, trained = _open(model_file, site)
    anatomy, prompt = anatomy_of(study.model), None
    if embedding is not None:
        if anatomy is None:
            raise StudyError("--embedding: this model takes none (its study has no model.anatomy); leave it out")
        prompt = torch.from_numpy(Embeddings(embedding, anatomy.dimension, "--embedding").only())
    if study.modality == "ct":
        done = reconstruct_ct(network, study, source, output, site, prompt, dose)
    elif dose is not None:
        raise StudyError("--dose: this is a model for MRI; leave it out")
    else:
        done = _reconstruct_mri(_mri_model(network, study, site), source, output, site)
    mind = warning(trained, done.scan, done.header)
    neutral = "No --embedding of the patient was given: the model's anatomy map is neutral."
    said = (
        done.said,
        summary(trained),
        *([neutral] if anatomy is not None and prompt is None else []),
        *done.minds,
        *([mind] if mind else []),
        f"Wrote {output}. Research use only.",
    )
    return "\n".join(said)


def _reconstruct_mri(model: _Model, source: Path, output: Path, site: str | None) -> Done:
    if source.is_dir():
        raise StudyError("this is a model for MRI: it takes one file, a NIfTI image or k-space", detail=str(source))
    if source.suffix == ".npy":
        kspace = _read_kspace(source, model.coils)
        images = _from_kspace(model.network, kspace)
        volume = Volume(images, (1.0, 1.0, 1.0), np.eye(4))
        said = (
            f"Reconstructed {_slices(images)} from k-space of {kspace.shape[1]} coils; "
            "k-space holds no voxel size, so 1 mm is written."
        )
        scan: dict[str, float | str] = {"acceleration": _acceleration(kspace), "coils": float(kspace.shape[1])}
    else:
        image = read_volume(source)
        volume = Volume(_from_image(model, image), image.spacing, image.affine)
        said = (
            f"Simulated a scan of {_slices(image.data)} by the scanner of {site or 'the study'} "
            f"(R = {model.acquisition.mask.acceleration:g}, {model.acquisition.coils} coils) and reconstructed it."
        )
        scan = simulated(model.acquisition)
    save_nifti(volume, output)
    return Done(said, scan)


@dataclass(frozen=True)
class _Model:
    """A released network, the scanner to simulate, and the numbers of coils it was trained with."""

    network: nn.Module
    acquisition: MRIAcquisition
    coils: tuple[int, ...]
    seed: int


def _open(path: Path, site: str | None) -> tuple[nn.Module, Study, ModelProtocols]:
    tensors, metadata = load_model(path)
    study = study_of(path, metadata)
    if study.task.kind != "reconstruction":
        raise StudyError(f"this model does not reconstruct images: its study's task is `{study.task.kind}`")
    if site is not None and site not in study.sites:
        raise StudyError(f"--site {site}: the model's study has no such site, only {', '.join(study.sites)}")
    tensors |= personal_part(path, site)
    network = build_model(study.model, study.modality)
    try:
        network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise DataError(
            "the model file's tensors do not fit the network of its study; get it again from where it was released",
            detail=f"{path}: {_one_line(error)}",
        ) from error
    serve(network, study, metadata, site)
    return network.eval(), study, read_protocols(metadata, study)


def _mri_model(network: nn.Module, study: Study, site: str | None) -> _Model:
    acquisition = study.acquisition if site is None else study.acquisition_of(site)
    assert isinstance(acquisition, MRIAcquisition)
    return _Model(network, acquisition, _trained_coils(study, site), study.seed)


def _trained_coils(study: Study, site: str | None) -> tuple[int, ...]:
    sites = study.training_sites if site is None else (site,)
    found = (study.acquisition_of(name) for name in sites)
    return tuple(sorted({a.coils for a in found if isinstance(a, MRIAcquisition)}))


def _read_kspace(source: Path, coils: tuple[int, ...]) -> Array:
    try:
        # Mapped: a header that says more than the file holds takes no memory.
        kspace = np.load(source, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError("the k-space file does not exist; check its path", detail=str(source)) from error
    except (OSError, EOFError, ValueError) as error:
        raise DataError("the k-space file is not a NumPy array (.npy)", detail=f"{source}: {error}") from error
    if not isinstance(kspace, np.ndarray):
        raise DataError("the k-space file holds several arrays; store one array as .npy", detail=str(source))
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
def _from_kspace(network: nn.Module, kspace: Array) -> Array:
    slices = [torch.from_numpy(data)[None] for data in kspace]
    operators = []
    for data in slices:
        mask = (data.abs().sum(dim=1) > 0).float()
        operators.append(CartesianMRI(low_resolution_maps(data, mask), mask))
    # Networks learn volumes whose maximum is 1: scale by the zero-filled peak of the volume, and back.
    peaks = [operator.A_adjoint(data).abs().amax() for operator, data in zip(operators, slices, strict=True)]
    scale = torch.stack(peaks).amax()
    images = [network(operator, data / scale)[0].abs() for operator, data in zip(operators, slices, strict=True)]
    return np.stack([(image * scale).numpy() for image in images], axis=-1)


@torch.no_grad()
def _from_image(model: _Model, volume: Volume) -> Array:
    peak = float(volume.data.max())
    if peak <= 0 or float(volume.data.min()) < -_UNDERSHOOT * peak:
        raise DataError("the image has negative values, so it is no magnitude image")
    height, width, count = volume.data.shape
    mask = sampling_mask(model.acquisition.mask, (height, width), public_generator(model.seed, "reconstruct", "mask"))
    slices = []
    for number in range(count):
        image = np.clip(volume.data[..., number] / peak, 0.0, 1.0).astype(np.float32)
        measured = simulate(image, model.acquisition, public_generator(model.seed, "reconstruct", number), mask)
        operator = CartesianMRI(measured.maps[None], measured.mask[None])
        slices.append(model.network(operator, measured.kspace[None]).abs()[0].numpy() * peak)
    return np.stack(slices, axis=-1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _slices(images: Array) -> str:
    count = images.shape[-1]
    return f"{count} slice{'s' if count != 1 else ''} of {images.shape[0]} x {images.shape[1]}"

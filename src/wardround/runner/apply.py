"""Applies a released model to an image or to raw data, for a clinic that has only the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wardround.data.volume import Volume, read_volume, write_nifti
from wardround.errors import DataError, StudyError
from wardround.models.build import build_model
from wardround.physics.coils import low_resolution_maps
from wardround.physics.masks import sampling_mask
from wardround.physics.mri import CartesianMRI
from wardround.physics.simulate import simulate
from wardround.runner.release import load_model
from wardround.study.acquisition import MRIAcquisition
from wardround.study.schema import Study
from wardround.wire.random import public_generator

Array = npt.NDArray[Any]


def reconstruct(model_file: Path, source: Path, output: Path, *, site: str | None = None) -> str:
    """Reconstruct `source` with a released model and write NIfTI to `output`; returns what was done, in a sentence.

    `source` is k-space, complex (coils, H, W) or (slices, coils, H, W) in .npy with zeros where nothing was measured,
    or a magnitude image in NIfTI, which is first scanned by the study's simulated scanner. Raises `DataError` and
    `StudyError`.
    """
    if not output.name.endswith((".nii", ".nii.gz")):
        raise StudyError("the output must be a NIfTI file: NAME.nii.gz")
    tensors, metadata = load_model(model_file)
    study = Study.model_validate(json.loads(metadata["study"]))
    if study.task.kind != "reconstruction":
        raise StudyError("this model does not reconstruct images")
    if site is not None and site not in study.sites:
        raise StudyError(f"--site {site}: the model's study has {', '.join(study.sites)}")
    acquisition = study.acquisition if site is None else study.acquisition_of(site)
    torch.manual_seed(0)
    network = build_model(study.model)
    network.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    network.eval()
    if source.suffix == ".npy":
        images, affine, spacing = _from_kspace(network, source), np.eye(4), (1.0, 1.0, 1.0)
        said = f"Reconstructed {images.shape[2]} slices from k-space"
    else:
        volume = read_volume(source)
        images = _from_image(network, volume, acquisition, study.seed)
        affine, spacing = volume.affine, volume.spacing
        factor = acquisition.mask.acceleration
        said = f"Simulated the acquisition of {images.shape[2]} slices (R={factor:g}) and reconstructed them"
    write_nifti(Volume(images, spacing, affine), output)
    return f"{said}. Research use only. {output}"


@torch.no_grad()
def _from_kspace(network: torch.nn.Module, source: Path) -> Array:
    try:
        kspace = np.load(source, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError("the k-space file is not a .npy array", detail=f"{source}: {error}") from error
    if kspace.ndim == 3:
        kspace = kspace[None]
    if kspace.ndim != 4 or not np.iscomplexobj(kspace):
        raise DataError(f"k-space must be complex (slices, coils, H, W); this is {kspace.dtype} {kspace.shape}")
    if not np.isfinite(kspace).all():
        raise DataError("the k-space holds values that are not finite")
    slices = []
    for data in torch.from_numpy(kspace.astype(np.complex64)):
        mask = (data.abs().sum(dim=0) > 0).float()[None]
        maps = low_resolution_maps(data[None], mask)
        operator = CartesianMRI(maps, mask)
        # Networks learn images of about [0, 1]: scale by the zero-filled peak, and back.
        scale = operator.A_adjoint(data[None]).abs().amax().clamp_min(1e-12)
        slices.append((network(operator, data[None] / scale).abs() * scale)[0].numpy())
    return np.stack(slices, axis=-1)


@torch.no_grad()
def _from_image(network: torch.nn.Module, volume: Volume, acquisition: MRIAcquisition, seed: int) -> Array:
    peak = float(volume.data.max())
    height, width, count = volume.data.shape
    mask = sampling_mask(acquisition.mask, (height, width), public_generator(seed, "reconstruct", "mask"))
    slices = []
    for number in range(count):
        image = np.ascontiguousarray(volume.data[..., number] / peak, dtype=np.float32)
        measured = simulate(image, acquisition, public_generator(seed, "reconstruct", number), mask)
        operator = CartesianMRI(measured.maps[None], measured.mask[None])
        slices.append(network(operator, measured.kspace[None]).abs()[0].numpy() * peak)
    return np.stack(slices, axis=-1)

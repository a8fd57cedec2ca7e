"""Applies a released model to magnitude images, which its acquisition's own operator scans first."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.readers.volume import Volume, read_volume
from wardround.runs.apply import peak_of, score_of, slices_said
from wardround.runs.apply_ct import Done, save_nifti
from wardround.runs.depth import look, total_variation
from wardround.study.schema import Study
from wardround.wire.random import public_generator


def reconstruct_scanned(
    network: nn.Module,
    study: Study,
    source: Path,
    output: Path,
    site: str | None,
    prompt: Tensor | None = None,
    dose: float | None = None,
    fallback: bool = False,
) -> Done:
    """Scan a magnitude image (NIfTI) by the simulated scanner of the study, or of `site`, and reconstruct its slices.

    With `fallback` it is total variation's image where the network is out of its depth. Raises `DataError` for an image
    that cannot be used and `StudyError` for any other input.
    """
    acquisition = study.acquisition if site is None else study.acquisition_of(site)
    if not isinstance(acquisition, type(study.scanner)):
        raise StudyError(f"the study has no scanner of its own; choose a site's with --site {' | '.join(study.sites)}")
    subject = acquisition.modality.upper()
    if dose is not None:
        raise StudyError(f"--dose: this is a model for {subject}; leave it out")
    if source.is_dir() or not source.name.endswith((".nii", ".nii.gz")):
        raise StudyError(
            f"this is a model for {subject}: it takes one NIfTI image, .nii or .nii.gz", detail=str(source)
        )
    image = read_volume(source)
    peak, (height, width, count) = peak_of(image, source), image.data.shape
    operator: LinearOperator = acquisition.operator(
        (height, width), public_generator(study.seed, "reconstruct", "operator")
    )

    def scanned(number: int, magnitude: Tensor) -> tuple[LinearOperator, Tensor]:
        random = public_generator(study.seed, "reconstruct", number)
        return operator, acquisition.measure(operator, magnitude.clamp(0.0, 1.0), random)

    def scan(number: int) -> tuple[LinearOperator, Tensor]:
        return scanned(number, torch.from_numpy((image.data[..., number] / peak).astype(np.float32))[None])

    def again(number: int, found: Tensor) -> tuple[LinearOperator, Tensor]:
        return scanned(number, found.abs() / found.abs().amax().clamp_min(1e-9))

    scans, classical = [partial(scan, number) for number in range(count)], total_variation(study)
    depth = look(network, scans, classical, again, score_of(image, peak))
    method = classical if fallback and depth is not None and depth.fires else network
    with torch.no_grad():
        images = [method(*each())[0].abs().numpy() * np.float32(peak) for each in scans]
    save_nifti(Volume(np.stack(images, axis=-1), image.spacing, image.affine, image.space), output)
    said = (
        f"Simulated a scan of {slices_said((height, width), count)} by the scanner of {site or 'the study'} "
        f"({acquisition.describe()}) and reconstructed it."
    )
    return Done(said, acquisition.facts(), depth=depth)

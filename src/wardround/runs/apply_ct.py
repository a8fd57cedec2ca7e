"""Applies a released CT model to images in Hounsfield units, which are scanned first, or to real projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wardround.errors import DataError, GeometryError, StudyError
from wardround.imaging.acquisition.ct.noise import insert_noise
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.acquisition.wrapped import Prompted
from wardround.imaging.datasets.ct import Grid, Slice, read_ct_volume, slices_of
from wardround.imaging.datasets.ct_volume import body_of, brought_back, scannable
from wardround.imaging.readers.ct_projections import CTProjections, read_projections
from wardround.imaging.readers.ct_protocol import acquisition_from_header
from wardround.imaging.readers.dicom import read_series, series_files
from wardround.imaging.readers.dicom_file import is_projection, open_dicom
from wardround.imaging.readers.dicom_inspect import find_dicom
from wardround.imaging.readers.volume import FloatArray, Volume, write_nifti
from wardround.imaging.writers.dicom import write_derived
from wardround.learning.scan_fit import ScanFit
from wardround.runs.depth import Depth, Scan, chosen, look, total_variation
from wardround.runs.protocols import Facts, stated
from wardround.study.ct import CTAcquisition, CTGeometry
from wardround.study.schema import Study
from wardround.study.tasks import ReconstructionTask
from wardround.tasks.ct import Scanner
from wardround.tasks.ct_metrics import ct_scores
from wardround.tasks.metrics import SSIM_WINDOW
from wardround.wire.random import public_generator

_ROWS = 2  # of measured projections are looked at: total variation of one takes minutes at clinical sizes


@dataclass(frozen=True)
class Done:
    """What was done, in a sentence, the protocol of the scan that was reconstructed, and what its header says.

    `minds` are lines about the input that whoever uses the output must know, `depth` how the network did there, `fit`
    how it was adapted to the scan, if it was.
    """

    said: str
    scan: Facts
    header: Facts = field(default_factory=dict)
    minds: tuple[str, ...] = ()
    depth: Depth | None = None
    fit: ScanFit | None = None


def reconstruct_ct(
    network: nn.Module,
    study: Study,
    source: Path,
    output: Path,
    site: str | None,
    prompt: Tensor | None = None,
    dose: float | None = None,
    fallback: bool = False,
) -> Done:
    """Reconstruct `source` and write it to `output`; returns what was done.

    `source` is a NIfTI volume in HU or the folder of a DICOM series, both first scanned by the simulated scanner of
    `site`, or a folder of DICOM-CT-PD projections of an axial scan. `output` is a NIfTI file, or for a DICOM series
    the folder of a derived one. Images come back on the grid of the input; those of projections on the study's number
    of pixels over the field of view. `prompt` is the patient's embedding (tokens, dimension), for a network that takes
    one. With a `dose` in (0, 1), noise is first put into projections that makes them those of a scan with this share of
    their dose. With `fallback` it is total variation's image where the network is out of its depth.
    Raises `DataError`, `StudyError` and `GeometryError`.
    """
    if dose is not None and not 0 < dose < 1:
        raise StudyError(f"--dose is the share of the measured dose that is left, above 0 and below 1; got {dose:g}")
    if dose is not None and not (source.is_dir() and _holds_projections(source)):
        raise StudyError(
            "--dose lowers the dose of measured projections (DICOM-CT-PD), and this input is none; an image is scanned "
            "with the photons of the study's scanner, or of --site"
        )
    nifti = output.name.endswith((".nii", ".nii.gz"))
    header: Facts = {}
    minds: tuple[str, ...] = ()
    if not source.is_dir():
        if source.suffix == ".npy":
            raise StudyError("this is a model for CT: it takes a NIfTI volume in HU or a DICOM folder")
        if find_dicom(source):
            raise DataError("this is one DICOM file; give the folder of the series", detail=str(source))
        volume = read_ct_volume(source)
    elif _holds_projections(source):
        if not nifti:
            raise StudyError("images of projections are written as NIfTI: NAME.nii.gz", detail=str(output))
        return _from_projections(network, study, source, output, prompt, dose, fallback)
    else:
        series = read_series(source)
        minds = (f"Mind: slices of the series may be missing: {series.gaps}.",) if series.gaps else ()
        if not nifti:
            images, depth = _rescanned(network, study, series.volume, site, prompt, fallback)
            write_derived(series, images, output, f"Simulated scan and reconstruction, study {study.name}")
            return _done(series.volume, study, site, stated(series.protocol), minds, depth)
        volume, header = series.volume, stated(series.protocol)
    images, depth = _rescanned(network, study, volume, site, prompt, fallback)
    save_nifti(replace(volume, data=images), output)
    return _done(volume, study, site, header, minds, depth)


def save_nifti(volume: Volume, output: Path, description: str = "") -> None:
    """Write a volume whole or not at all. Raises DataError where the disk does not take it."""
    try:
        write_nifti(volume, output, description=description)
    except OSError as error:
        raise DataError(f"the output cannot be written: {error.strerror}", detail=str(output)) from error


def _holds_projections(folder: Path) -> bool:
    files = series_files(folder)
    return bool(files) and is_projection(open_dicom(files[0]))


def _acquisition(study: Study, site: str | None) -> CTAcquisition:
    acquisition = study.acquisition if site is None else study.acquisition_of(site)
    if not isinstance(acquisition, CTAcquisition):
        raise StudyError(f"the study has no scanner of its own; choose a site's with --site {' | '.join(study.sites)}")
    return acquisition


@torch.no_grad()
def _rescanned(
    network: nn.Module, study: Study, volume: Volume, site: str | None, prompt: Tensor | None, fallback: bool
) -> tuple[FloatArray, Depth | None]:
    """Every slice scanned and reconstructed, in HU on the volume's grid (rows, columns, slices)."""
    scanner = Scanner(_acquisition(study, site))
    grid, slices = scanner.grid, slices_of(volume)
    middle = _middle(slices, grid)
    operator = _prompted(scanner.system, prompt)

    def scan(number: int) -> tuple[Tensor, Tensor]:
        return scanner.scan(
            scannable(slices[number], middle, grid), public_generator(study.seed, "reconstruct", number)
        )

    def score(number: int, image: Tensor) -> dict[str, float]:
        target = scan(number)[1][None]
        values = ct_scores(image.clamp_min(0.0), target, torch.ones_like(target))
        return {name: float(values[name]) for name in ("psnr", "rmse_hu", "ssim")}

    def again(number: int, image: Tensor) -> tuple[LinearOperator, Tensor]:
        data, _ = scanner.scan(_hounsfield(image), public_generator(study.seed, "again", number))
        return operator, data[None]

    def measured(number: int) -> tuple[LinearOperator, Tensor]:
        return operator, scan(number)[0][None]

    scans = [partial(measured, number) for number in range(len(slices))]
    classical = total_variation(study)
    small = min(scanner.acquisition.geometry.size) < SSIM_WINDOW
    depth = look(network, scans, classical, again, None if small else score)
    method = chosen(network, classical, depth, fallback)
    pixel = scanner.acquisition.geometry.pixel
    images = [
        brought_back(_hounsfield(method(*each())), pixel, like, middle)
        for each, like in zip(scans, slices, strict=True)
    ]
    return np.stack(images, axis=-1), depth


def _middle(slices: list[Slice], grid: Grid) -> tuple[float, float]:
    """The middle of the body over all slices, in pixels: one for all of them, so that they stay in line.

    Raises DataError where the body does not fit the field of view.
    """
    middle, reach = body_of(slices)
    if reach > grid.radius + grid.pixel:
        raise DataError(
            f"the body reaches {reach:.0f} mm from its middle, but the study's scanner sees {grid.radius:.0f} mm; "
            "choose another --site, or a model of a study with a larger field of view"
        )
    return middle


@torch.no_grad()
def _from_projections(
    network: nn.Module,
    study: Study,
    source: Path,
    output: Path,
    prompt: Tensor | None,
    dose: float | None,
    fallback: bool,
) -> Done:
    assert isinstance(study.task, ReconstructionTask)
    projections = read_projections(source, size=study.task.size)
    if dose is not None:
        projections = _at_dose(projections, dose, public_generator(study.seed, "dose"))
    scans: list[Scan] = []
    heights, skipped = [], 0
    system: CTSystem | None = None
    for row in range(projections.sinogram.shape[1]):
        try:
            geometry = projections.row_geometry(row)
        except DataError:
            skipped += 1
            continue
        if system is None:
            system = CTSystem(_measured(projections, geometry))
        scans.append(partial(_row, projections, row, system, prompt))
        heights.append(projections.row_height(row))
    if system is None:
        raise GeometryError("no detector row of the projections lies near enough to the plane of the source")
    classical = total_variation(study)
    depth = look(network, scans, classical, _as_in_training(study, system, prompt), most=_ROWS)
    method = chosen(network, classical, depth, fallback)
    images = [_hounsfield(method(*scan())) for scan in scans]
    lowered = "" if dose is None else f"simulated at {dose:.3g} of the measured dose"
    save_nifti(_placed(images, heights, projections), output, lowered)
    left = f"; {skipped} rows lie too far off the plane of the source" if skipped else ""
    geometry = projections.geometry
    said = f"Reconstructed {len(images)} detector rows of {geometry.views} views of {geometry.bins} bins{left}."
    scan, header = system.acquisition.facts(), stated(projections.protocol)
    unknown = {"photons"} if projections.photons is None else set()
    if "tube voltage" not in header:
        unknown.add("tube voltage")
    minds = tuple(_orientation(projections.position))
    if dose is not None:
        said += f" The dose is {lowered}: noise was put into the projections."
    return Done(said, {name: value for name, value in scan.items() if name not in unknown}, header, minds, depth)


def _row(
    projections: CTProjections, row: int, system: CTSystem, prompt: Tensor | None
) -> tuple[LinearOperator, Tensor]:
    sinogram = torch.from_numpy(np.ascontiguousarray(projections.sinogram[:, row]))
    return _prompted(system, prompt), system.scaled(sinogram)[None]


def _as_in_training(
    study: Study, system: CTSystem, prompt: Tensor | None
) -> Callable[[int, Tensor], tuple[LinearOperator, Tensor] | None]:
    """Scans an image on the grid of `system` with the scanner of the first training site."""
    acquisition = study.acquisition_of((study.training_sites or tuple(study.sites))[0])
    assert isinstance(acquisition, CTAcquisition)
    scanner, pixel = Scanner(acquisition), system.acquisition.geometry.pixel

    def again(number: int, image: Tensor) -> tuple[LinearOperator, Tensor] | None:
        hu, grid = _hounsfield(image), scanner.grid
        middle = ((hu.shape[0] - 1) / 2, (hu.shape[1] - 1) / 2)
        placed = scannable(Slice(hu, (pixel, pixel)), middle, grid)
        data, _ = scanner.scan(placed, public_generator(study.seed, "again", number))
        return _prompted(scanner.system, prompt), data[None]

    return again


def _at_dose(projections: CTProjections, dose: float, random: np.random.Generator) -> CTProjections:
    """Projections as they would be with a share of their dose; electronic noise, which they do not name, is assumed.

    Raises DataError where they name no photons.
    """
    if projections.photons is None:
        raise DataError(
            "the projections do not say how many photons reached a bin through air (7033,1065), and without that no "
            "lower dose can be simulated; leave --dose out"
        )
    noisy = insert_noise(
        projections.sinogram, dose, projections.photons[:, None], CTAcquisition().electronic_noise, random
    )
    return replace(projections, sinogram=noisy, photons=np.asarray(dose * projections.photons, np.float32))


def _orientation(position: str | None) -> Iterator[str]:
    yield (
        "Mind: images lie as the convention of DICOM-CT-PD puts them (docs/ct.md); that left and right, head and feet "
        "are so has not been checked against a real scan."
    )
    if position != "HFS":
        lies = f"the patient lies {position}" if position else "it is not said how the patient lies (PatientPosition)"
        yield f"Mind: {lies}, not head first and supine (HFS); nothing was turned for it."


def _placed(images: list[FloatArray], heights: list[float], projections: CTProjections) -> Volume:
    """The slices of detector rows from the feet up, around the isocentre."""
    pixel, step = projections.geometry.pixel, projections.slice_spacing
    rows, columns = images[0].shape
    order = np.argsort(heights)
    # Rows go to the back and columns to the left, as in DICOM, which is -y and -x in RAS.
    back, left = pixel * (rows - 1) / 2, pixel * (columns - 1) / 2
    affine = np.array([[0, -pixel, 0, left], [-pixel, 0, 0, back], [0, 0, step, min(heights)], [0, 0, 0, 1.0]])
    return Volume(np.stack([images[index] for index in order], axis=-1), (pixel, pixel, step), affine)


def _measured(projections: CTProjections, geometry: CTGeometry) -> CTAcquisition:
    """The protocol of a real scan: its geometry and photons as calibrated, the rest as its header says."""
    photons = {} if projections.photons is None else {"photons": float(np.median(projections.photons))}
    # The distances of DICOM-CT-PD are the calibrated ones, those of the plain header nominal.
    header = replace(projections.protocol, source_distance=None, detector_distance=None)
    return acquisition_from_header(header, CTAcquisition(geometry=geometry, mu_water=projections.mu_water, **photons))


def _prompted(system: CTSystem, prompt: Tensor | None) -> LinearOperator:
    return system if prompt is None else Prompted(system, prompt[None])


def _hounsfield(image: Tensor) -> FloatArray:
    """A network's image (1, H, W) in HU, (H, W), at least -1000."""
    return np.asarray(1000.0 * (image[0].clamp_min(0.0) - 1.0).numpy(), np.float32)


def _done(
    volume: Volume, study: Study, site: str | None, header: Facts, minds: tuple[str, ...], depth: Depth | None
) -> Done:
    count = volume.data.shape[-1]
    acquisition = _acquisition(study, site)
    said = (
        f"Simulated a scan of {count} slice{'s' if count != 1 else ''} by the scanner of {site or 'the study'} "
        f"({acquisition.geometry.views} views, {acquisition.photons:g} photons) and reconstructed it at "
        f"{_resolution(acquisition)}."
    )
    # The tube voltage of a simulation decides nothing unless it has a spectrum; the input's own is in its header.
    scan = {name: value for name, value in acquisition.facts().items() if name != "tube voltage"}
    return Done(said, scan, header, minds, depth)


def _resolution(acquisition: CTAcquisition) -> str:
    rows, columns = acquisition.geometry.size
    return f"{rows} x {columns} pixels of {acquisition.geometry.pixel:g} mm"

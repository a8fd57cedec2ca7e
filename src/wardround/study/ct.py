"""What a CT scanner does, as data: its geometry and its dose, part of the study and of every model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator

from wardround.errors import StudyError
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.base import Config
from wardround.study.scanners import resolved
from wardround.study.tasks import ReconstructionTask

# Attenuation of water in 1/mm at about 70 keV, the effective energy of a diagnostic tube.
MU_WATER = 0.0192
# Feature of a scanner, smallest and largest value: wide enough for every preset, and for most scanners ever built.
PROTOCOL_BOUNDS = MappingProxyType(
    {
        "log2_views": (5.0, 12.0),
        "log2_bins": (5.0, 11.0),
        "pixel_mm": (0.2, 6.0),
        "bin_mm": (0.2, 6.0),
        "source_distance_mm": (300.0, 900.0),
        "detector_distance_mm": (200.0, 800.0),
        "log10_photons": (3.0, 7.0),
    }
)


class CTGeometry(Config):
    """Where source, detector and image lie; lengths in mm, angles in degrees.

    The image's middle is the isocentre. View k stands at start + k * sweep / views. For fan beams, `bin` is measured
    at the detector: along a flat detector, or along the arc around the source.
    """

    kind: Literal["parallel", "fan_flat", "fan_arc"] = "fan_flat"
    size: tuple[int, int] = Field((256, 256), description="rows and columns of the image")
    pixel: float = Field(1.0, gt=0.0, description="edge of a pixel")
    views: int = Field(180, ge=1, le=100_000)
    start: float = Field(0.0, description="angle of the first view")
    sweep: float | None = Field(None, gt=0.0, le=360.0, description="default 180 for parallel beams, 360 for fans")
    bins: int = Field(368, ge=1, le=100_000)
    bin: float = Field(2.5716, gt=0.0, description="distance between the middles of neighbouring bins")
    offset: float = Field(0.0, description="where the central ray falls, in bins beyond the detector's middle")
    source_distance: float | None = Field(None, gt=0.0, description="source to isocentre; required for fans")
    detector_distance: float | None = Field(None, ge=0.0, description="isocentre to detector; required for fans")
    body_radius: float | None = Field(
        None, gt=0.0, description="the detector must see this circle in every view; default the image's inscribed one"
    )

    @model_validator(mode="after")
    def _complete(self) -> CTGeometry:
        distances = (self.source_distance, self.detector_distance)
        if self.kind == "parallel" and distances != (None, None):
            raise ValueError("parallel beams have no source; remove `source_distance` and `detector_distance`")
        if self.kind != "parallel" and None in distances:
            raise ValueError(f"kind={self.kind} needs `source_distance` and `detector_distance` in mm")
        if min(self.size) < 1:
            raise ValueError(f"size={self.size} has no pixels; give rows and columns, at least 1")
        return self

    @property
    def sweep_degrees(self) -> float:
        """Angle that all views cover together: as configured, or 180 for parallel beams and 360 for fans."""
        return self.sweep or (180.0 if self.kind == "parallel" else 360.0)


class CTAcquisition(AcquisitionSettings):
    """Simulated acquisition of a slice in Hounsfield units.

    `kvp`, `slice_thickness` and `kernel` describe the scan; only beam hardening computes with `kvp`.
    `preset: NAME` stands for the numbers of a known scanner (docs/ct.md lists them), and what is given beside it
    changes them; the study then holds the numbers and not the name.
    """

    modality = "ct"
    baselines = ("fbp", "tv", "weighted_tv")
    reconstruction = "wardround.tasks.ct:CTReconstruction"
    applied = "wardround.runs.apply_ct:reconstruct_ct"
    chain = "wardround.tasks.chain_ct:SinogramScanning"
    costs = "wardround.runs.explain_ct:explain_matrices"
    headers = True
    augments = True
    inside = "body"
    purpose = "Research on reconstruction from projections of the protocols below."
    caveat = (
        "Each site's images in Hounsfield units were turned into projections by a model of its scanner (geometry, "
        "photons, read-out noise). Projections measured by a scanner hold effects that this leaves out."
    )
    peak = "The range of PSNR is 4096 HU (from −1024 to 3072); another range would shift all its values."

    kind: Literal["ct"] = "ct"
    geometry: CTGeometry = CTGeometry(source_distance=595.0, detector_distance=490.6)
    photons: float = Field(1e5, gt=0.0, le=1e9, description="photons I0 that reach a bin through air, per view")
    electronic_noise: float = Field(3.2, ge=0.0, description="standard deviation of read-out noise, in photons")
    mu_water: float = Field(MU_WATER, gt=0.0, description="attenuation of water in 1/mm")
    beam_hardening: bool = Field(False, description="a tube's spectrum, corrected for water, instead of one energy")
    kvp: float = Field(120.0, ge=60.0, le=150.0, description="tube voltage in kV")
    slice_thickness: float | None = Field(None, gt=0.0, description="mm")
    kernel: str | None = Field(None, description="the vendor's name of the reconstruction kernel")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return resolved(value) if isinstance(value, Mapping) and "preset" in value else value

    def describe(self) -> str:
        """Geometry, views and photons."""
        return f"{self.geometry.kind}, {self.geometry.views} views, {self.photons:g} photons"

    def facts(self) -> dict[str, float | str]:
        """The geometry and the dose."""
        geometry = self.geometry
        distances: dict[str, float | str] = {}
        if geometry.source_distance is not None and geometry.detector_distance is not None:
            distances = {
                "source to isocentre": geometry.source_distance,
                "isocentre to detector": geometry.detector_distance,
            }
        return {
            "geometry": geometry.kind,
            "views": float(geometry.views),
            "bins": float(geometry.bins),
            "pixel": geometry.pixel,
            "bin": geometry.bin,
            **distances,
            "photons": self.photons,
            "tube voltage": self.kvp,
        }

    def features(self) -> tuple[float, ...]:
        """Seven numbers, in the order of `PROTOCOL_BOUNDS` and scaled by them to [0, 1].

        After HyperFed, with bounds that hold its own sites. Parallel beams have their source infinitely far away: 1.
        Values beyond the bounds are cut off, so that a network never sees more than it was made for.
        """
        geometry = self.geometry
        values = (
            math.log2(geometry.views),
            math.log2(geometry.bins),
            geometry.pixel,
            geometry.bin,
            math.inf if geometry.source_distance is None else geometry.source_distance,
            math.inf if geometry.detector_distance is None else geometry.detector_distance,
            math.log10(self.photons),
        )
        bounds = zip(values, PROTOCOL_BOUNDS.values(), strict=True)
        return tuple(min(max((value - low) / (high - low), 0.0), 1.0) for value, (low, high) in bounds)

    def subject(self, contrasts: Sequence[str]) -> str:
        """A site's files are not told apart by contrast."""
        return "CT"

    def check(self, task: ReconstructionTask, site: str) -> None:
        """The image's size stands in the geometry and in the task."""
        self.check_size(task.size, site)

    def check_size(self, size: tuple[int, int], site: str) -> None:
        """Raise `StudyError` where images of a task have another size than the geometry."""
        if self.geometry.size != size:
            raise StudyError(
                f"the geometry of site {site} has size {list(self.geometry.size)} and the task {list(size)}; give "
                "`geometry.size` and `task.size` the same rows and columns"
            )

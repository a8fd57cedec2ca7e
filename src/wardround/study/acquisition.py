"""What a scanner does, as data: the simulated protocol of each site, part of the study and of every model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from wardround.errors import StudyError
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.base import Config
from wardround.study.tasks import ReconstructionTask

# Where a site's coil maps come from: two estimates from the scan's calibration lines, or the simulated scanner's own.
Maps = Literal["estimated", "espirit", "true"]
# ESPIRiT needs at least this number of calibration lines.
ESPIRIT_LINES = 6


class Mask(Config):
    """Which lines of k-space are measured.

    `random` and `equispaced` vary along the phase-encode axis; `poisson` is a two-dimensional Poisson disc.
    `acceleration` counts the calibration lines: 4 means that a quarter of all lines are measured in total.
    """

    family: Literal["random", "equispaced", "poisson"] = "random"
    acceleration: float = Field(4.0, ge=1.0, le=64.0)
    calibration: float = Field(0.08, gt=0.0, le=1.0, description="fully sampled central fraction of lines")
    fixed: bool = Field(False, description="one mask for all scans of the site instead of one per patient")

    @model_validator(mode="after")
    def _room_for_the_calibration(self) -> Mask:
        if self.family != "poisson" and self.calibration > 1.0 / self.acceleration:
            raise ValueError(
                f"calibration={self.calibration} alone exceeds the 1/{self.acceleration} of lines measured in total; "
                "lower `calibration` or `acceleration`"
            )
        return self


class CoilAcquisition(AcquisitionSettings):
    """What simulated acquisitions of magnitude images with coils share, whatever k-space they measure."""

    modality = "mri"
    baselines = ("zero_filled", "cg_sense", "tv")
    inside = "head"
    purpose = "Research on reconstruction from undersampled raw data of the protocols below."
    caveat = (
        "Each site's magnitude images were turned into raw data by a model of a scanner with that site's protocol "
        "(coils, sampling, noise, phase). Raw data measured by a scanner hold effects that this leaves out, and images "
        "stored as magnitudes, above all with 8 bits, flatter the scores."
    )

    coils: int = Field(8, ge=1, le=128)
    noise: float = Field(
        0.005,
        ge=0.0,
        le=1.0,
        description="std of the noise in each coil's real and imaginary part, relative to the image peak",
    )
    noise_correlation: float = Field(0.0, ge=0.0, lt=1.0, description="correlation of noise between neighbouring coils")
    phase: float = Field(1.0, ge=0.0, description="strength of the smooth image phase in radians; 0 is real")
    coil_radius: float = Field(1.5, gt=1.0, description="distance of the coils from the centre, in half fields of view")
    maps: Maps = Field(
        "estimated",
        description="`estimated` from the calibration lines, fast, with the image's smooth phase; `espirit` with more "
        "detail and without that phase (ESPIRiT); `true`, those of the simulated coils",
    )


class MRIAcquisition(CoilAcquisition):
    """Simulated multi-coil Cartesian acquisition of a magnitude image."""

    reconstruction = "wardround.tasks.mri:MRIReconstruction"
    applied = "wardround.runs.apply:reconstruct_mri"
    chain = "wardround.tasks.chain_mri:KSpaceScanning"
    raw = "wardround.runs.raw_scans:raw_input"
    splits = True

    kind: Literal["mri"] = "mri"
    mask: Mask = Mask()

    def describe(self) -> str:
        """Mask, coils and noise."""
        return f"{self.mask.acceleration:g}× {self.mask.family}, {self.coils} coils, noise {self.noise}"

    def facts(self) -> dict[str, float | str]:
        """Mask and coils."""
        return {"mask": self.mask.family, "acceleration": self.mask.acceleration, "coils": float(self.coils)}

    def check(self, task: ReconstructionTask, site: str) -> None:
        """See `check_maps`."""
        self.check_maps(task.size, site)

    def check_maps(self, size: tuple[int, int], site: str) -> None:
        """Raise `StudyError` where ESPIRiT cannot estimate maps from what a site's scanner measures of images."""
        if self.maps != "espirit":
            return
        instead = "or set maps: estimated"
        if self.coils == 1:
            raise StudyError(
                f"acquisition.maps: espirit compares coils, and the scanner of site {site} has one; give it more "
                f"(acquisition.coils), {instead}"
            )
        axes = size if self.mask.family == "poisson" else size[1:]
        lines = min(round(self.mask.calibration * each) for each in axes)
        if lines < ESPIRIT_LINES:
            raise StudyError(
                f"acquisition.maps: espirit needs {ESPIRIT_LINES} calibration lines, and the scanner of site {site} "
                f"measures {lines} of images of {size[0]} x {size[1]}; raise acquisition.mask.calibration, {instead}"
            )

"""What a scanner does, as data: the simulated protocol of each site, part of the study and of every model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

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


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"a range rises: write [{ends[1]:g}, {ends[0]:g}]")
    return ends


_At = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Above = Annotated[float, Field(gt=0.0, le=64.0)]
Range = Annotated[tuple[_At, _At], AfterValidator(_rising)]
PositiveRange = Annotated[tuple[_Above, _Above], AfterValidator(_rising)]


class MRIVariety(Config):
    """How training scans differ from the site's scanner: each is drawn anew, with its image changed beforehand.

    Ranges replace the scanner's own value and are drawn evenly, `noise`, `coils`, `zoom` and `gamma` in logarithms, so
    that of 1 to 12 coils every fourth scan has one; what is absent stays. Validation and test scans, and classical
    methods, see the site's scanner as it is.
    """

    acceleration: Annotated[PositiveRange | None, Field(description="replaces mask.acceleration; from 1 on")] = None
    families: tuple[Literal["random", "equispaced"], ...] = Field((), description="one of these replaces mask.family")
    calibration: PositiveRange | None = Field(None, description="replaces mask.calibration")
    coils: tuple[Annotated[int, Field(ge=1, le=128)], Annotated[int, Field(ge=1, le=128)]] | None = None
    coil_radius: PositiveRange | None = None
    noise: PositiveRange | None = None
    noise_correlation: Range | None = None
    phase: Range | None = None
    phase_detail: Range | None = None
    zoom: PositiveRange | None = Field(
        None, description="images enlarged by this about a moved centre, any field of view"
    )
    turns: bool = Field(False, description="quarter turns, so that lines run along both axes of the anatomy")
    gamma: PositiveRange | None = Field(None, description="contrast: intensities to this power")
    tones: float = Field(
        0.0, ge=0.0, le=1.0, description="contrast: share of scans whose intensities follow a random curve"
    )
    bias: float = Field(0.0, ge=0.0, lt=1.0, description="smooth shading of the image by up to this share")

    @model_validator(mode="after")
    def _possible(self) -> MRIVariety:
        if self.acceleration is not None and self.acceleration[0] < 1.0:
            raise ValueError("vary.acceleration begins below 1, which measures every line; write 1 or more")
        if self.calibration is not None and self.calibration[1] > 1.0:
            raise ValueError("vary.calibration ends above 1, which is every line; write 1 or less")
        if self.coil_radius is not None and self.coil_radius[0] <= 1.0:
            raise ValueError("vary.coil_radius begins within the field of view; write more than 1")
        if self.noise_correlation is not None and self.noise_correlation[1] >= 1.0:
            raise ValueError("vary.noise_correlation ends at 1 or above, where coils measure one noise; write less")
        if self.coils is not None:
            _rising(self.coils)
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
    phase_detail: float = Field(
        0.0,
        ge=0.0,
        description="strength of local image phase in radians: between tissues, at their edges, around vessels and air",
    )
    coil_radius: float = Field(1.5, gt=1.0, description="distance of the coils from the centre, in half fields of view")
    coil_variety: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="how unlike the coils are in gain, distance and field, which no two real arrays share",
    )
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
    costs = "wardround.runs.explain_mri:explain_scanners"

    kind: Literal["mri"] = "mri"
    mask: Mask = Mask()
    reference: Literal["image", "scan"] = Field(
        "image",
        description="what is learned and scored: the `image` that was scanned, without noise, or the `scan` with all "
        "lines and its noise, which is all that there is of a real one",
    )
    vary: MRIVariety | None = Field(None, description="training scans of many scanners instead of the site's one")

    def describe(self) -> str:
        """Mask, coils and noise."""
        own = f"{self.mask.acceleration:g}× {self.mask.family}, {self.coils} coils, noise {self.noise}"
        return own if self.vary is None else f"{own}, varied in training"

    def facts(self) -> dict[str, float | str]:
        """Mask and coils."""
        return {"mask": self.mask.family, "acceleration": self.mask.acceleration, "coils": float(self.coils)}

    def trained(self) -> dict[str, tuple[float | str, ...]]:
        """The ranges of `vary` in place of the scanner's own values."""
        found = super().trained()
        if self.vary is None:
            return found
        varied = {"acceleration": self.vary.acceleration, "coils": self.vary.coils}
        ranges = {name: tuple(map(float, ends)) for name, ends in varied.items() if ends is not None}
        return found | ranges | ({"mask": self.vary.families} if self.vary.families else {})

    def check(self, task: ReconstructionTask, site: str) -> None:
        """See `check_maps`, for the fewest coils and calibration lines that training scans have, too."""
        self.check_maps(task.size, site)
        if self.vary is not None:
            fewest = {"coils": min(self.coils, *(self.vary.coils or (self.coils,)))}
            lines = min(self.mask.calibration, *(self.vary.calibration or (self.mask.calibration,)))
            mask = self.mask.model_copy(update={"calibration": lines})
            self.model_copy(update={**fewest, "mask": mask}).check_maps(task.size, site)

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

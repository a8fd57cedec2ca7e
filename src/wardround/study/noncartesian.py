"""Non-Cartesian MRI, as data: along which trajectory a site's scanner goes through k-space."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from wardround.errors import DataError, StudyError
from wardround.study.acquisition import CoilAcquisition
from wardround.study.base import Config, at
from wardround.study.tasks import ReconstructionTask


class Radial(Config):
    """Lines through the centre of k-space."""

    kind: Literal["radial"] = "radial"
    spokes: int = Field(32, ge=2, le=4096)
    angles: Literal["golden", "uniform"] = Field(
        "golden", description="each line turned by 111.25 degrees from the one before, or all evenly over half a turn"
    )
    oversampling: float = Field(2.0, ge=1.0, le=8.0, description="samples of a line for each pixel of the longer side")

    def describe(self) -> str:
        """Lines and their angles."""
        return f"radial, {self.spokes} {self.angles} spokes"


class Spiral(Config):
    """Interleaved spirals from the centre of k-space to its edge."""

    kind: Literal["spiral"]
    interleaves: int = Field(8, ge=1, le=1024)
    turns: float = Field(
        4.0,
        gt=0.0,
        le=512.0,
        description="of each interleaf; 2 x interleaves x turns = pixels of a side is fully sampled at exponent 1",
    )
    exponent: float = Field(
        1.0,
        ge=1.0,
        le=4.0,
        description="the radius grows as this power of the angle: 1 is even, more dense at the centre",
    )
    oversampling: float = Field(1.25, ge=1.0, le=8.0, description="samples along the curve for each Cartesian step")

    def describe(self) -> str:
        """Interleaves and turns."""
        return f"spiral, {self.interleaves} interleaves of {self.turns:g} turns"


Trajectory = Annotated[Radial | Spiral, Field(discriminator="kind")]


class NonCartesianAcquisition(CoilAcquisition):
    """Simulated multi-coil acquisition of a magnitude image along radial lines or spirals; sites may differ in them.

    Noise is that of a sample, as in `mri`. Data and operator are weighted by the density of samples.
    """

    reconstruction = "wardround.tasks.noncartesian:NonCartesianReconstruction"
    applied = "wardround.runs.apply_noncartesian:reconstruct_noncartesian"
    costs = "wardround.runs.explain_mri:explain_scanners"

    kind: Literal["mri_noncartesian"] = "mri_noncartesian"
    trajectory: Trajectory = Radial()
    fixed: bool = Field(
        False, description="one trajectory for all scans of the site instead of one turned by chance for each patient"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_lines(cls, value: Any) -> Any:
        if isinstance(value, dict) and "mask" in value:
            raise ValueError("`mask` chooses lines of a Cartesian scan; a `trajectory` says what this one measures")
        return value

    def check(self, task: ReconstructionTask, site: str) -> None:
        """Raise `StudyError` for maps by ESPIRiT, which needs calibration lines."""
        if self.maps == "espirit":
            raise StudyError(
                f"acquisition.maps: espirit needs calibration lines, and the scanner of site {site} measures none; "
                "set maps: estimated"
            )

    def describe(self) -> str:
        """Trajectory, coils and noise."""
        return f"{self.trajectory.describe()}, {self.coils} coils, noise {self.noise}"

    def facts(self) -> dict[str, float | str]:
        """Trajectory and coils."""
        own = self.trajectory.model_dump(exclude={"kind"})
        numbers = {key: value if isinstance(value, str) else float(value) for key, value in own.items()}
        return {"trajectory": self.trajectory.kind, **numbers, "coils": float(self.coils)}

    def scanned(self, image: Any, of_operator: Any, of_scan: Any) -> tuple[Any, Any]:
        """A scan of an image (1, H, W) along the trajectory, its maps as in training."""
        found: tuple[Any, Any] = at("wardround.imaging.acquisition.mri.noncartesian_scanner:scanned")(
            self, image, of_operator, of_scan
        )
        return found

    def read(self, raw: Any) -> tuple[Any, Any]:
        """Raises DataError: an array of samples has no trajectory; `wardround.reconstruct` reads files with both."""
        raise DataError(
            "raw data of a non-Cartesian scan need its trajectory, which one array does not hold; give the file to "
            "`wardround reconstruct`"
        )

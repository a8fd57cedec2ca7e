"""Raw data that a site's own scanner measured: what a study does with them, part of it and of every model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from wardround.errors import StudyError
from wardround.study.acquisition import ESPIRIT_LINES, Mask
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.tasks import ReconstructionTask


class RawAcquisition(AcquisitionSettings):
    """Multi-coil Cartesian k-space as scanners write it: fastMRI and ISMRMRD (HDF5), BART, NumPy, MATLAB.

    `sampling: retrospective` takes fully sampled files and leaves lines out as `mask` says, which is drawn for each
    patient; `own` takes files that were undersampled when they were measured.
    """

    modality = "mri"
    baselines = ("zero_filled", "cg_sense", "tv")
    reconstruction = "wardround.tasks.mri_raw:RawMRIReconstruction"
    applied = "wardround.runs.apply:reconstruct_mri"
    costs = "wardround.runs.explain_mri:explain_scanners"
    measured = True
    splits = True
    inside = "head"
    purpose = "Research on reconstruction from undersampled raw data of scanners like those below."
    caveat = (
        "Raw data are those that each site's scanner measured. Where they were fully sampled, lines were left out "
        "afterwards: a scan that measures fewer lines is shorter, and moves less."
    )

    kind: Literal["mri_raw"] = "mri_raw"
    sampling: Literal["retrospective", "own"] = Field(
        "retrospective", description="lines left out of full scans by `mask`, or files undersampled as they are"
    )
    mask: Mask = Field(Mask(), description="of `sampling: retrospective`")
    reference: Literal["rss", "combined", "file", "none"] = Field(
        "rss",
        description="what images are compared with. Of full scans: `rss`, root sum of squares of the coil images, or "
        "`combined`, these combined by the coil maps that the reconstruction has. Of `sampling: own`: `file`, the "
        "file's own reference image, or `none`, which `supervision: {kind: split}` learns without",
    )
    maps: Literal["estimated", "espirit"] = Field(
        "estimated",
        description="`estimated` from the calibration lines, fast, with the image's smooth phase; `espirit` with more "
        "detail and without that phase (ESPIRiT)",
    )

    @model_validator(mode="after")
    def _reference_fits(self) -> RawAcquisition:
        if self.sampling == "own" and self.reference not in ("file", "none"):
            raise ValueError(
                "sampling: own has no full scan to make a reference of; set `reference: file` where the files hold one "
                "(reconstruction_rss), else `reference: none`"
            )
        # By value: a released model's file holds every default.
        if self.sampling == "own" and self.mask != Mask():
            raise ValueError("sampling: own takes each file's own mask; take `mask` out of the study")
        if self.sampling == "retrospective" and self.reference not in ("rss", "combined"):
            raise ValueError("sampling: retrospective makes its reference of the full scan; take `rss` or `combined`")
        return self

    @property
    def has_reference(self) -> bool:
        """Whether true images are known."""
        return self.reference != "none"

    def describe(self) -> str:
        """What is done with the raw data."""
        if self.sampling == "own":
            return "raw data undersampled as measured"
        return f"{self.mask.acceleration:g}× {self.mask.family} of full raw data"

    def facts(self) -> dict[str, float | str]:
        """The mask; coils are the files'."""
        if self.sampling == "own":
            return {}
        return {"mask": self.mask.family, "acceleration": self.mask.acceleration}

    def subject(self, contrasts: Sequence[str]) -> str:
        """A site's files are not told apart by contrast."""
        return "MRI raw data"

    def check(self, task: ReconstructionTask, site: str) -> None:
        """Contrasts are names of image files, and raw data have none. ESPIRiT needs some calibration lines."""
        if task.contrasts != ReconstructionTask.model_fields["contrasts"].default:
            raise StudyError("task.contrasts names image files, and raw data are taken whole; take it out")
        axes = task.size if self.mask.family == "poisson" else task.size[1:]
        lines = min(round(self.mask.calibration * each) for each in axes)
        if self.maps == "espirit" and self.sampling == "retrospective" and lines < ESPIRIT_LINES:
            raise StudyError(
                f"acquisition.maps: espirit needs {ESPIRIT_LINES} calibration lines, and {lines} of {axes[-1]} are "
                f"left at site {site}; raise acquisition.mask.calibration, or set maps: estimated"
            )

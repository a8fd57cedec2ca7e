"""What a reconstruction network learns from: true images, or measured samples alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.study.base import Config

if TYPE_CHECKING:
    from wardround.study.acquisitions import AcquisitionSettings
    from wardround.study.schema import Study


class Supervision(Config):
    """Whether a site has true images to learn from, or splits what was measured (SSDU, Yaman et al., MRM 2020).

    `split`: of each training example the network sees some measured samples, and the loss is how well its image
    predicts the others. No true image is used, in training and in the choice of the released round.
    """

    kind: Literal["full", "split"] = Field("full", description="learn from true images, or from measured samples alone")
    share: float = Field(
        0.4, gt=0.0, lt=1.0, description="of the samples outside the calibration centre: those that the loss sees"
    )
    held: Literal["samples", "lines"] = Field(
        "samples",
        description="what is held out: single samples, as in the paper, or whole lines of a scan of lines, which are "
        "what it lacks and harder to predict",
    )
    density: Literal["gaussian", "uniform"] = Field(
        "gaussian",
        description="how these are drawn, in each step anew: more often near the centre (a deviation of a quarter of "
        "each axis), or all alike",
    )

    @property
    def splits(self) -> bool:
        """Whether measured samples are split."""
        return self.kind == "split"


def check_supervision(study: Study, acquisition: AcquisitionSettings, site: str) -> None:
    """Raise `StudyError` where a site cannot learn from what the study says that it learns from."""
    key = f"sites.{site}.supervision" if study.sites[site].supervision is not None else "task.supervision"
    splits = study.supervision_of(site).splits
    if acquisition.closed:
        return
    if splits and not acquisition.splits:
        raise StudyError(
            f"{key}: samples are split for MRI of a Cartesian grid, and site {site} has acquisition.kind: "
            f"{acquisition.kind}; set `kind: full`"
        )
    mask = getattr(acquisition, "mask", None)
    if splits and study.supervision_of(site).held == "lines" and mask is not None and mask.family == "poisson":
        raise StudyError(
            f"{key}: held: lines needs a scan of lines, and the mask of site {site} leaves out single samples "
            "(poisson); set `held: samples`"
        )
    if not splits and not acquisition.has_reference and site in study.training_sites:
        raise StudyError(
            f"{key}: the raw data of site {site} come without true images, so there is nothing to learn from; set "
            f"`sites.{site}.supervision: {{kind: split}}`"
        )

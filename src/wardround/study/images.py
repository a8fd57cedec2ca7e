"""What the sections of tasks of images share: whose the images are, how they are parted and changed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from wardround.study.base import Config
from wardround.study.tasks import Split, TaskSettings


class CaseTable(Config):
    """A CSV in each site's folder that says whose each image is."""

    file: str = Field("labels.csv", pattern=r"^[^/\\]+$")
    id: str = Field("image", description="the column that names an image, `{id}` of the patterns")
    patient: str = Field("patient", description="the column that names whose it is: images of one are never parted")


class LabelTable(CaseTable):
    """A CSV in each site's folder that says whose each image is, and what it shows."""

    label: str = Field("label", description="the column that names its class, or its classes with `;` between them")


class ImageSettings(TaskSettings):
    """The base of tasks that begin with images."""

    scanner = "none"

    dimensions: Literal[2, 3] = 2
    split: Split = Split()
    augment: Literal["standard", "none"] | tuple[dict[str, Any], ...] = Field(
        "standard", description="or a list of MONAI's random dictionary transforms: `{name: RandFlipd, prob: 0.5}`"
    )
    leave_one_out: bool = Field(False, description="train once without each training site for the `unseen` figures")

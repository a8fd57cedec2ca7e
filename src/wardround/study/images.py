"""What the sections of tasks of images share: whose the images are, how they are parted and changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

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

    scanner: ClassVar[Literal["needed", "optional", "none"]] = "none"

    dimensions: Literal[2, 3] = 2
    split: Split = Split()
    augment: Literal["standard", "none"] | tuple[dict[str, Any], ...] = Field(
        "standard", description="or a list of MONAI's random dictionary transforms: `{name: RandFlipd, prob: 0.5}`"
    )
    leave_one_out: bool = Field(False, description="train once without each training site for the `unseen` figures")


def each_a_channel(images: Sequence[str], channels: int) -> tuple[str, ...]:
    """The files of an image where there are several and each is a channel, so that one may be missing; else none."""
    return tuple(images) if len(images) > 1 and channels == len(images) else ()


#: Modality dropout; see `wardround.tasks.contrasts`.
DropShare = Annotated[
    float,
    Field(
        ge=0.0,
        lt=1.0,
        description="how often a training example comes without one of its contrasts (its channel is 0), each by "
        "itself and at least one staying: so the network learns to do without, for sites with `missing` and for "
        "patients in `wardround predict`",
    ),
]


class DrawnSettings(ImageSettings):
    """The base of tasks that learn what was drawn in images."""

    images: tuple[str, ...] = Field(
        ("image",),
        min_length=1,
        description="the files of an image, a channel each (or several, where a file has them), as patterns relative "
        "to a site's folder without ending: `flair` is `{patient}/flair`; others are `imagesTr/{patient}`, "
        "`{patient}/{patient}_t1ce`, `{patient}/{id}.jpg`; a folder with a DICOM series serves as a file",
    )
    mask: str = Field("mask", description="the file of its mask, likewise; or a DICOM SEG")
    table: CaseTable | None = None
    channels: int = Field(1, ge=1, description="channels of all files of an image together; 3 for a colour picture")
    structures: dict[str, Literal["any"] | tuple[int, ...]] = Field(
        {"structure": "any"},
        min_length=1,
        description="what is outlined, and the mask's values that mean it; `any` is every value but 0",
    )
    annotated: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="for a site that does not draw all structures: those it draws"
    )
    empty_every: int = Field(3, ge=1, description="2-D of volumes: every n-th slice without a structure is an example")
    distances: Literal["mm", "pixels"] = Field("mm", description="`pixels` where files do not say how large they are")

    @model_validator(mode="after")
    def _draws_what_there_is(self) -> Self:
        for site, drawn in self.annotated.items():
            if unknown := sorted(set(drawn) - self.structures.keys()):
                raise ValueError(f"task.annotated.{site}: {unknown[0]!r} is not in task.structures")
        return self

    @property
    def values(self) -> dict[str, tuple[int, ...] | None]:
        """The mask's values of each structure; `None` for every value but 0."""
        return {name: None if values == "any" else values for name, values in self.structures.items()}

    def drawn_at(self, site: str) -> list[bool]:
        """Which structures a site draws."""
        drawn = self.annotated.get(site, tuple(self.structures))
        return [name in drawn for name in self.structures]


class OverlapLoss(Config):
    """Weights of the two parts of the loss."""

    dice: float = Field(1.0, ge=0.0)
    cross_entropy: float = Field(1.0, ge=0.0)


class UsedLabels(Config):
    """How many of a site's training patients train, to find out what few labels are worth."""

    share: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="of the training patients of each site, at least one; the others do not train, or learn from a "
        "`teacher` alone",
    )
    draw: int = Field(0, ge=0, description="which patients: another number draws others")

    def describe(self) -> str:
        """What stands behind the words of a task; nothing where all train."""
        return f", labels of {self.share:.3g} of the training patients (draw {self.draw})" if self.share < 1.0 else ""


class ClassSettings(ImageSettings):
    """The base of tasks that learn which of several classes a patient's images show."""

    images: tuple[str, ...] = Field(("images/{id}",), min_length=1, description="as in a segmentation")
    table: LabelTable = LabelTable()
    labels: UsedLabels = UsedLabels()
    classes: tuple[str, ...] = Field(min_length=2, description="as the table names them")
    multi_label: bool = Field(False, description="whether a patient can have several classes, or none")
    channels: int = Field(3, ge=1)
    size: tuple[int, ...] = (128, 128)
    imbalance: str = "none"

    @model_validator(mode="after")
    def _names_each_class_once(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("task.classes names a class twice")
        if self.multi_label and self.imbalance in ("balanced", "logit_adjusted"):
            raise ValueError(f"task.imbalance: {self.imbalance} is for one class a patient; take weighted")
        return self

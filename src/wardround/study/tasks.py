"""What a study can learn, and how that is measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from wardround.study.base import Config, Factory, KindName, Settings
from wardround.study.supervision import Supervision
from wardround.study.teacher import TaughtBy

# What images and raw data are: `mri`, `ct`, or as an acquisition outside names it.
Modality = str


class Slices(Config):
    """Which slices of a volume are examples."""

    every: int = Field(1, ge=1, description="take every n-th slice")
    minimum_foreground: float = Field(0.05, ge=0.0, lt=1.0, description="skip slices with less tissue than this")
    per_patient: int | None = Field(None, ge=1, description="at most this number of slices, evenly spread")


class Split(Config):
    """Shares of a site's patients for validation and test; the rest trains. Drawn from the seed, by patient."""

    validation: float = Field(0.15, ge=0.0, lt=1.0)
    test: float = Field(0.2, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _someone_trains(self) -> Split:
        if self.validation + self.test >= 1.0:
            raise ValueError("`validation` and `test` leave no patient to train on; their sum must stay below 1")
        return self


class Loss(Config):
    """The training loss, on magnitude images scaled to the range of the acquisition."""

    kind: Literal["l1", "mse", "ssim", "l1_ssim", "psnr"] = "l1"
    masked: bool = Field(False, description="inside the mask of the head (MRI) or body (CT) only")


class ClassicalSettings(Config):
    """The classical methods that images are compared with, and the weights that validation patients choose from."""

    baselines: tuple[KindName, ...] | None = Field(
        None,
        description="default zero_filled, cg_sense and tv for MRI, fbp, tv and weighted_tv for CT; tv_real is TV of a "
        "real image, what a network with `image: real` assumes, too; also [a plug-in's](data.md#plug-ins)",
    )
    tv_weights: tuple[float, ...] | None = Field(
        None, description="default 0.0005 to 0.008 for MRI, 0.0002 to 0.0012 for CT"
    )
    cg_weights: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)


class Evaluation(ClassicalSettings):
    """What is measured on test patients."""

    slices: Slices = Slices(per_patient=8)
    tuning_slices: int = Field(2, ge=1, description="slices per validation patient used to tune a baseline")
    leave_one_out: bool = Field(
        False,
        description="train once without each training site for the `unseen` figures; not with `protection.secure`",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_replicates(cls, value: Any) -> Any:
        if isinstance(value, dict) and "bootstrap" in value:
            raise ValueError(
                "`bootstrap` is gone: replicate sums gave away every test patient. Sites compute intervals themselves; "
                "take the key out"
            )
        return value


class TaskSettings(Settings):
    """The base of every task's section: `build` makes the task, and the rest says what else a study of it has."""

    #: Whether a study of it says how sites scan (`acquisition`): `needed` has a default, `optional` has none.
    scanner: ClassVar[Literal["needed", "optional", "none"]] = "optional"
    #: The method that settings of a model must have to serve it; empty where any, or none, does.
    network: ClassVar[str] = ""
    #: Whether its network may see images of one shape, whose amplitudes a method uses (`MethodSettings.spectrum`).
    spectral: ClassVar[bool] = False
    #: How many of the classical methods that an acquisition comes with are compared, the first ones; `None` for all.
    compared: ClassVar[int | None] = None
    #: Where in a study its arms without one site are asked for.
    leave_one_out_key: ClassVar[str] = "task.leave_one_out"

    @property
    def leaves_out(self) -> bool:
        """Whether the study trains once more without each of its training sites."""
        return bool(getattr(self, "leave_one_out", False))

    @property
    def compares_with(self) -> tuple[str, ...] | None:
        """The classical methods that results are shown beside; `None` for those that its acquisition comes with."""
        return ()

    @property
    def taught_by(self) -> TaughtBy | None:
        """The released model that teaches, where there is one and anything is learned from it."""
        teacher = getattr(self, "teacher", None)
        # A plug-in's task may have a key of that name, which means what it says.
        return teacher if isinstance(teacher, TaughtBy) and teacher.teaches else None

    @property
    def may_lack(self) -> tuple[str, ...]:
        """The files of an image, each a channel, of which a site may lack some; none where that means nothing."""
        return ()

    @property
    def classical(self) -> ClassicalSettings | None:
        """What the study says of classical methods at `task.evaluation`; `None` where it says nothing there."""
        return None

    def build(self, study: Any, embeddings: Mapping[str, Path]) -> Any:
        """The `wardround.tasks.task.Task` of a `study` with this section.

        `embeddings`: files that sites provide beside their images, by site.
        """
        raise NotImplementedError


class ReconstructionTask(TaskSettings):
    """From undersampled raw data to an image."""

    scanner = "needed"
    network = "build"
    leave_one_out_key = "task.evaluation.leave_one_out"

    kind: Literal["reconstruction"] = "reconstruction"
    contrasts: tuple[str, ...] = Field(("image",), min_length=1, description="MRI: names of the files, without ending")
    size: tuple[int, int] = (128, 128)
    slices: Slices = Slices()
    split: Split = Split()
    flips: bool = Field(True, description="random left-right flips of training examples")
    augment: bool = Field(False, description="CT: random quarter turns before each training scan, with new noise")
    loss: Loss = Loss()
    supervision: Supervision = Field(
        Supervision(), description="MRI: what sites learn from that do not say it themselves"
    )
    evaluation: Evaluation = Evaluation()

    @property
    def leaves_out(self) -> bool:
        """What its evaluation says."""
        return self.evaluation.leave_one_out

    @property
    def compares_with(self) -> tuple[str, ...] | None:
        """What its evaluation says."""
        return self.evaluation.baselines

    @property
    def classical(self) -> ClassicalSettings:
        """Its evaluation."""
        return self.evaluation


class CustomTask(TaskSettings):
    """Your own task: `factory` is called with `options` and returns a `Task`.

    It is an entry point of the group `wardround.tasks` that the site allows in `plugins`, or `package.module:callable`
    with `--allow-code`.
    """

    spectral = True

    kind: Literal["custom"]
    factory: Factory
    options: dict[str, Any] = Field(default_factory=dict)

    def describe(self) -> str:
        """Whose it is."""
        return f"a task of your own ({self.factory})"


class ClosedTask(TaskSettings):
    """The section of a plug-in's task as the file has it."""

    model_config = ConfigDict(extra="allow")
    closed = True

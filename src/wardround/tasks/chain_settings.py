"""What the sections of chains share: tasks that begin with a simulated scan and end in a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from wardround.study.base import Config
from wardround.study.images import ImageSettings
from wardround.study.models import ModelSettings
from wardround.study.registry import MODELS, Reading, builtin, builtins, read
from wardround.study.tasks import ClassicalSettings, Loss
from wardround.tasks.augmentation import SPATIAL
from wardround.tasks.metrics import SSIM_WINDOW


class ImageLosses(Config):
    """The losses of the stages; `schedule.phases` says with which weights they count in which rounds."""

    reconstruction: Loss = Loss()


def second_network(value: Any, info: ValidationInfo, task: str, build: str, cannot: str) -> Any:
    """The section of a second network, of those that `build` for `task`; one of the package's own, for `model` is not
    its place. Raises ValueError for one that `cannot`.
    """
    if isinstance(value, Mapping) and "kind" not in value:
        value = {"kind": MODELS[task], **value}
    found: Any = read("model", value, info)
    unread = isinstance(info.context, Reading) and "model" in info.context.unread
    if not unread and (found.closed or not hasattr(found, build)):
        kinds = [kind for settings in builtins("model") if hasattr(settings, build) for kind in settings.kinds()]
        raise ValueError(f"{found.kind} {cannot}; take {', '.join(kinds)}")
    return found


def default_second(task: str) -> ModelSettings:
    """The second network of a study that names none: that of a `task` of images."""
    kind = MODELS[task]
    found: Any = builtin("model", kind).model_validate({"kind": kind})
    settings: ModelSettings = found
    return settings


class ChainSettings(ImageSettings):
    """The base of tasks from raw data over an image to a diagnosis; stages `reconstruction` and `diagnosis`."""

    scanner = "needed"
    network = "build"
    compared = 1

    dimensions: Literal[2] = 2
    augment: Literal["standard", "none"] | tuple[dict[str, Any], ...] = Field(
        "standard",
        description="changes of an image before its scan, and of its mask: flips and, of square images, quarter turns; "
        "or a list of MONAI's random dictionary transforms that move voxels",
    )
    channels: int = Field(
        1, ge=1, description="channels of all files of an image together, each of which is scanned; CT: 1"
    )
    size: tuple[int, int] = Field(
        (128, 128),
        description="rows and columns of a reconstructed slice. MRI: images of another size are resampled before their "
        "scan; CT: those of every `geometry.size`",
    )
    seen: Literal["reconstruction", "zero_filled", "fbp", "full"] = Field(
        "reconstruction",
        description="what the second network sees; for comparison, images that nothing learned (zero-filled ones of "
        "MRI, filtered back projections of CT) or those that were scanned, and then `diagnosis` is the only stage",
    )
    window: tuple[float, float] | None = Field(
        None,
        description="CT: the range in HU that the second network sees as -1 to 1, cut off at both ends; default "
        "-1000 to 400",
    )
    losses: ImageLosses = ImageLosses()
    evaluation: ClassicalSettings = Field(
        ClassicalSettings(),
        description="the classical methods that the images are compared with, by default `zero_filled` alone for MRI "
        "and `fbp` for CT; of their images there is no diagnosis",
    )

    @model_validator(mode="after")
    def _images_fit(self) -> ChainSettings:
        if min(self.size) < SSIM_WINDOW:
            raise ValueError(f"task.size: slices must have at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, one of SSIM")
        for step in self.augment if isinstance(self.augment, tuple) else ():
            if step.get("name") not in SPATIAL:
                raise ValueError(
                    f"task.augment: {step.get('name')!r} does not only move voxels, and what is scanned must stay an "
                    f"image of a patient; take {', '.join(SPATIAL)}"
                )
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError("task.window: give the lower end first")
        return self

    @property
    def compares_with(self) -> tuple[str, ...] | None:
        """What its evaluation says; nothing without a first stage."""
        return () if self.seen != "reconstruction" else self.evaluation.baselines

    @property
    def classical(self) -> ClassicalSettings:
        """Its evaluation."""
        return self.evaluation

    @property
    def second_sees(self) -> str:
        """For people: what the second network sees."""
        return {
            "reconstruction": "image",
            "zero_filled": "zero-filled image",
            "fbp": "filtered back projection",
            "full": "image as it was scanned",
        }[self.seen]

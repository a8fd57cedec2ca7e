"""What every federated method says of itself in a study; each method's own settings are in its file.

`wardround.study.registry` lists the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from wardround.study.base import Factory, Settings

if TYPE_CHECKING:
    from wardround.study.schema import Study

#: What an amplitude holds before it is measured: none is negative. So far from 0 that the fixed point of the first
#: round, which begins at four times a buffer's largest value, has room for amplitudes of any normalised image.
UNKNOWN_AMPLITUDE = -8.0
#: The parts of a network that hold amplitudes.
AMPLITUDE, AMPLITUDE_BANK = "amplitude", "amplitude_bank"


@dataclass(frozen=True)
class Spectrum:
    """What a method needs of the amplitudes of images (`wardround.models.spectrum`), as parts of the network.

    `mean`: the network sees all images with one amplitude. `bank`: the number that each site gives, of a `window`.
    """

    mean: bool = False
    bank: int = 0
    window: float = 0.003


class MethodSettings(Settings):
    """The base of every method's section: `build` makes the method."""

    #: Whether all that it sends of data went through gradients, so that `protection.privacy` can cover it.
    noised: ClassVar[bool] = False
    #: Whether the update of one plain step is a sum of gradients, to which noise of several sites adds up.
    adds_up: ClassVar[bool] = False
    #: Whether it folds low-rank products into weights, for which the layers that have them need room.
    folds: ClassVar[bool] = False
    #: Whether an update that trained from an older state can enter the mean of a later round: nothing pairs what site
    #: and coordinator keep by round, and changes mean the same from whichever state (`schedule.asynchronous`).
    late: ClassVar[bool] = False

    @property
    def spectrum(self) -> Spectrum | None:
        """What it needs of the amplitudes of images; `None` for nothing."""
        return None

    @property
    def only(self) -> tuple[str, ...]:
        """Patterns of the parameters that alone learn, in every arm of the study; none where all may."""
        return ()

    def check(self, study: Study) -> None:
        """Raise `ValueError` where the method means nothing with what else the study says."""

    @property
    def pulls(self) -> tuple[float, ...]:
        """How strongly a site's own model may be held near the common one, where it has one to choose for."""
        return ()

    def build(self, protocols: Mapping[str, Any]) -> Any:
        """The `wardround.learning.methods.Method`. `protocols`: the features (7,) of the training sites' scanners."""
        raise NotImplementedError


class WeightedSettings(MethodSettings):
    """A method that weighs sites."""

    weights: Literal["samples", "equal", "validation"] = Field(
        "samples", description="`validation` is exp(-validation loss), clamped"
    )


class AveragingSettings(WeightedSettings):
    """A method that weighs sites and keeps nothing at them: batch norm is averaged as all else is."""

    unseen_norm: Literal["shared", "own"] = Field(
        "shared",
        description="what batch-norm layers normalise by at a hospital that did not train: the sites' averaged "
        "statistics, or those of its `own` images, which need no label",
    )


class CustomMethod(MethodSettings):
    """Your own method: `factory` is an entry point of the group `wardround.methods` that the site allows in
    `plugins`, or `package.module:callable` with `--allow-code`.
    """

    kind: Literal["custom"]
    factory: Factory
    options: dict[str, Any] = Field(default_factory=dict)

    def describe(self) -> str:
        """Whose it is."""
        return f"your own ({self.factory})"


class ClosedMethod(MethodSettings):
    """The section of a plug-in's method as the file has it."""

    model_config = ConfigDict(extra="allow")
    closed = True

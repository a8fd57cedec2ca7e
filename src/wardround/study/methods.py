"""What every federated method says of itself in a study; each method's own settings are in its file.

`wardround.study.registry` lists the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from wardround.study.base import Factory, Settings


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

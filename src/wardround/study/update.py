"""What a study says that goes on from a released model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wardround.study.base import Config

#: The row of the results with what the release gives that a study continues.
PARENT = "parent"


class Update(Config):
    """A study that continues a release: `start` names it, and the new model takes its place only if no site loses."""

    margins: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=dict,
        description="by metric, how much worse than the release the new model may be at a site, in the metric's unit: "
        "the lower end of the 95 % interval of the paired difference must lie above minus this. Default: the task's "
        "first metric, 0.02 of Dice, 0.1 dB, 0.01 of AUROC",
    )

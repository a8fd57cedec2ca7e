"""The released model that teaches a network, beside what is drawn or named at each site (Hinton et al., 2015)."""

from __future__ import annotations

from pydantic import Field

from wardround.study.base import Config
from wardround.study.start import Below, Hash


class TaughtBy(Config):
    """The released model of another run, which says of each training image what the network should say.

    The loss is alpha x the task's own + (1 - alpha) x temperature^2 x the divergence from the teacher's probabilities,
    softened by the temperature. The teacher never changes, and is in no message.
    """

    file: Below = Field(
        description="the run's folder, or the model's file, where it lies below the study's folder; a site's `teacher` "
        "in the sites file is any other place"
    )
    sha256: Hash = Field("", description="`model_sha256` of that run; without it an error says what it is")
    alpha: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="weight of the task's own loss; 1 is a study without a teacher, 0 learns from the teacher alone",
    )
    temperature: float = Field(
        2.0, gt=0.0, description="by which logits are divided before they become probabilities, in this part alone"
    )

    @property
    def teaches(self) -> bool:
        """Whether anything is learned from it."""
        return self.alpha < 1.0

    def describe(self) -> str:
        """With the hash that the study fixes."""
        return f"the released model {self.sha256} (alpha {self.alpha:g}, temperature {self.temperature:g})"

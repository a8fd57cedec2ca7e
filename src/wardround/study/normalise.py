"""How the numbers of an image become what a network sees: part of the model, so that a clinic does the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from wardround.study.base import Config

# The percentiles whose values are landmarks: the ends of what counts, and the deciles (Nyul, Udupa and Zhang, IEEE TMI
# 2000, their choice L4 with other ends).
PERCENTILES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)
# What the first and the last landmark become: about what they are where values are normal with deviation 1.
STANDARD = (-2.0, 2.0)
_MOST_CHANNELS = 64


class ZScore(Config):
    """Each channel of an image less its mean, over its deviation, both over what the channel shows."""

    kind: Literal["zscore"] = "zscore"

    def describe(self) -> str:
        """For `check`; nothing, since it is the default."""
        return ""

    def formula(self) -> str:
        """What becomes of a channel, in a clause."""
        return "each channel less its mean over its deviation"


class PercentileScale(Config):
    """Each channel of an image on a line from two of its percentiles to -2 and 2: bright spots do not move it."""

    kind: Literal["percentiles"]
    low: float = Field(1.0, ge=0.0, lt=100.0, description="the percentile, over what a channel shows, that becomes -2")
    high: float = Field(99.0, gt=0.0, le=100.0, description="the one that becomes 2")

    @model_validator(mode="after")
    def _low_is_below_high(self) -> PercentileScale:
        if self.low >= self.high:
            raise ValueError("task.normalise: `low` must be below `high`")
        return self

    def describe(self) -> str:
        """For `check`."""
        return f"channels scaled by their percentiles {self.low:g} and {self.high:g}"

    def formula(self) -> str:
        """What becomes of a channel, in a clause."""
        return f"each channel's percentiles {self.low:g} and {self.high:g} at -2 and 2"


class Landmarks(Config):
    """The percentiles of each channel of an image at values that the study gives, straight lines between (and beyond).

    Nyul, Udupa and Zhang, *New variants of a method of MRI scale standardization*, IEEE TMI 19(2), 2000.
    `wardround inspect --across SITES STUDY --landmarks FILE` writes the section: the mean over all training patients.
    """

    kind: Literal["landmarks"]
    percentiles: tuple[float, ...] = Field(PERCENTILES, min_length=2, max_length=101, description="over what is shown")
    values: tuple[tuple[float, ...], ...] = Field(
        min_length=1, max_length=_MOST_CHANNELS, description="for each channel, what its percentiles become"
    )

    @model_validator(mode="after")
    def _rises(self) -> Landmarks:
        ends = self.percentiles[0] >= 0.0 and self.percentiles[-1] <= 100.0
        if not ends or any(low >= high for low, high in pairwise(self.percentiles)):
            raise ValueError("task.normalise.percentiles: must rise, from 0 to 100")
        for number, values in enumerate(self.values):
            if len(values) != len(self.percentiles):
                raise ValueError(
                    f"task.normalise.values: channel {number} has {len(values)} of {len(self.percentiles)} landmarks"
                )
            if any(low >= high for low, high in pairwise(values)):
                raise ValueError(f"task.normalise.values: those of channel {number} must rise")
        return self

    def describe(self) -> str:
        """For `check`."""
        return f"histograms matched to {len(self.percentiles)} landmarks"

    def formula(self) -> str:
        """What becomes of a channel, in a clause."""
        return f"each channel's percentiles at the study's {len(self.percentiles)} landmarks"


Normalise = Annotated[ZScore | PercentileScale | Landmarks, Field(discriminator="kind")]


def check_normalise(settings: Any) -> None:
    """Raise ValueError where a task's landmarks are of another number of channels than its images."""
    normalise = settings.normalise
    if isinstance(normalise, Landmarks) and len(normalise.values) != settings.channels:
        raise ValueError(
            f"task.normalise.values: landmarks of {len(normalise.values)} channels, and the images have "
            f"{settings.channels} (task.channels)"
        )

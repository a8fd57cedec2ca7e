"""What a network that outlines what a prompt marks is given: boxes or points, of the mask or found by a network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wardround.study.base import Config


class BoxPrompt(Config):
    """The box around a structure, its four sides moved at random."""

    kind: Literal["box"] = "box"
    jitter: float = Field(
        8.0,
        gt=0.0,
        le=256.0,
        description="pixels of what the network sees by which each side is moved at most; more than 0, for the box of "
        "the mask itself tells the network what it is asked for: results with that one stand beside, as `oracle_dice`",
    )

    def describe(self) -> str:
        """What `check`, report and model card say of it."""
        return f"a box with sides off by up to {self.jitter:g} pixels"


class PointPrompt(Config):
    """Points inside a structure, at random."""

    kind: Literal["points"]
    count: int = Field(1, ge=1, le=16)

    def describe(self) -> str:
        """What `check`, report and model card say of it."""
        return "a point inside" if self.count == 1 else f"{self.count} points inside"


class AutomaticPrompt(Config):
    """The box around what a second, small network finds, which learns in the same study."""

    kind: Literal["automatic"]
    jitter: float = Field(
        8.0,
        gt=0.0,
        le=256.0,
        description="in training, boxes of the masks are given, with sides moved by at most this number of pixels",
    )
    preset: Literal["tiny", "small", "paper"] = Field("small", description="of the localiser, a U-Net")
    size: int = Field(64, ge=32, multiple_of=16, description="pixels of a side of what the localiser sees")

    def describe(self) -> str:
        """What `check`, report and model card say of it."""
        return "the box around what a localiser finds"


Prompt = Annotated[BoxPrompt | PointPrompt | AutomaticPrompt, Field(discriminator="kind")]

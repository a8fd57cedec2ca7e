"""The networks that a study can train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wardround.study.base import Config


class MoDL(Config):
    """Unrolled reconstruction with conjugate-gradient data consistency (Aggarwal et al., IEEE TMI 2019)."""

    kind: Literal["modl"] = "modl"
    preset: Literal["tiny", "small", "paper"] = "small"
    unrolls: int | None = Field(None, ge=1, le=50)
    cg_iterations: int | None = Field(None, ge=1, le=100)
    channels: int | None = Field(None, ge=1, le=1024)
    layers: int | None = Field(None, ge=2, le=50)
    scale: Literal[1, 2, 4] | None = Field(None, description="the denoiser sees images so many times smaller")
    norm: Literal["none", "batch", "instance"] | None = None
    image: Literal["complex", "real"] | None = Field(
        None, description="`real` constrains the phase to that of the estimated coil maps"
    )


class UNet(Config):
    """Post-processing U-Net on the zero-filled image (MONAI's BasicUNet)."""

    kind: Literal["unet"]
    preset: Literal["tiny", "small", "paper"] = "small"
    norm: Literal["none", "batch", "instance"] | None = None


Model = Annotated[MoDL | UNet, Field(discriminator="kind")]

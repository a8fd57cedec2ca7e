"""The networks that a study can train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from wardround.errors import StudyError
from wardround.study.base import Config
from wardround.study.tasks import Modality

Preset = Literal["tiny", "small", "paper"]
Hidden = Annotated[
    tuple[Annotated[int, Field(ge=1, le=4096)], ...],
    Field(min_length=1, max_length=8, description="the hypernetwork's hidden layers"),
]
HIDDEN = (64, 64)
CONDITIONED = "CT only: a hypernetwork tells every layer the scanner's protocol"


class MoDL(Config):
    """Unrolled reconstruction with conjugate-gradient data consistency (Aggarwal et al., IEEE TMI 2019); CT and MRI."""

    kind: Literal["modl"] = "modl"
    preset: Preset = "small"
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
    """Post-processing U-Net on the zero-filled image or, for CT (FBPConvNet), on the filtered back projection."""

    kind: Literal["unet"]
    preset: Preset = "small"
    norm: Literal["none", "batch", "instance"] | None = None
    conditioned: bool = Field(False, description=CONDITIONED)
    hidden: Hidden = HIDDEN


class Learn(Config):
    """LEARN: unrolled gradient descent with learned regularisers (Chen et al., IEEE TMI 2018); CT and MRI."""

    kind: Literal["learn"]
    preset: Preset = "small"
    unrolls: int | None = Field(None, ge=1, le=100)
    channels: int | None = Field(None, ge=1, le=1024)
    prox: Literal["cnn", "unet"] | None = Field(None, description="each iteration's network")
    layers: int | None = Field(None, ge=2, le=50, description="convolutions of a `cnn`")
    norm: Literal["none", "batch", "instance"] | None = Field(None, description="between the layers of a `cnn`")
    levels: int | None = Field(None, ge=1, le=5, description="resolutions of a `unet`")
    scale: Literal[1, 2, 4] | None = Field(None, description="the networks see images so many times smaller")
    gradient: Literal["adjoint", "fbp"] | None = Field(
        None, description="the misfit's gradient, or its filtered back projection"
    )
    weighted: bool | None = Field(None, description="rays count by the photons behind them, where the noise says")
    guided: bool | None = Field(None, description="each iteration's network sees the gradient, too")
    conditioned: bool = Field(False, description=CONDITIONED)
    hidden: Hidden = HIDDEN

    @model_validator(mode="after")
    def _norm_has_a_place(self) -> Learn:
        if self.prox == "unet" and self.norm not in (None, "none"):
            raise ValueError("`norm` stands between the layers of `prox: cnn`; remove it, or choose that")
        return self


class Anatomy(Config):
    """A patient's anatomy as a prompt: each site provides the embeddings of its reports (SCAN-PhysFed, 2025).

    Where they lie, the sites file says (`sites.NAME.embeddings`). Defaults are the authors' sizes: 40 million values.
    """

    dimension: int = Field(32_000, ge=1, le=1_000_000, description="values of an embedding")
    pool: int = Field(4, ge=1, description="so many neighbouring values are averaged first")
    width: int = Field(2048, ge=1, le=16_384)
    heads: int = Field(4, ge=1, description="of the attention; they divide the width")
    map: int = Field(59, ge=1, le=1024, description="rows and columns of the map")
    weight: float = Field(0.1, ge=0.0, le=1.0, description="w in out = (1 - w) c + w c A")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Anatomy:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} do not divide width={self.width}; choose others")
        if self.pool > self.dimension:
            raise ValueError(f"pool={self.pool} is more than dimension={self.dimension}; lower it")
        return self


class REDCNN(Config):
    """RED-CNN on the filtered back projection (Chen et al., IEEE TMI 2017); CT only."""

    kind: Literal["redcnn"]
    preset: Preset = "small"
    channels: int | None = Field(None, ge=1, le=1024)
    conditioning: Literal["none", "every", "bottleneck"] = Field(
        "none", description="`every` convolution (HyperFed) or the `bottleneck` (SCAN-PhysFed) knows the protocol"
    )
    hidden: Hidden = HIDDEN
    anatomy: Anatomy | None = Field(None, description="the bottleneck knows an embedding of the patient's report")


class LPD(Config):
    """Learned primal-dual reconstruction (Adler and Oktem, IEEE TMI 2018); CT only."""

    kind: Literal["lpd"]
    preset: Preset = "small"
    unrolls: int | None = Field(None, ge=1, le=100)
    channels: int | None = Field(None, ge=1, le=1024)
    memory: int | None = Field(None, ge=1, le=64, description="images, and sinograms, that iterations hand on")
    conditioned: bool = Field(False, description=CONDITIONED)
    hidden: Hidden = HIDDEN


class TwoBand(Config):
    """A network for low and one for high spatial frequencies, on the filtered back projection; CT only."""

    kind: Literal["two_band"]
    preset: Preset = "small"
    channels: int | None = Field(None, ge=1, le=1024)
    layers: int | None = Field(None, ge=2, le=50)
    cutoff: float = Field(0.1, gt=0.0, le=0.5, description="where both bands weigh the same, in cycles per pixel")


class IRadonMAP(Config):
    """A network on the sinogram, filtered back projection and a network on the image, as in FedCT; CT only."""

    kind: Literal["iradonmap"]
    preset: Preset = "small"
    channels: int | None = Field(None, ge=1, le=1024)
    layers: int | None = Field(None, ge=2, le=50)
    conditioned: bool = Field(True, description="a hypernetwork tells the image's network the scanner's protocol")
    hidden: Hidden = HIDDEN


Model = Annotated[MoDL | UNet | Learn | REDCNN | LPD | TwoBand | IRadonMAP, Field(discriminator="kind")]


def anatomy_of(model: Model) -> Anatomy | None:
    """The prompt that a network takes, if any."""
    return model.anatomy if isinstance(model, REDCNN) else None


def check_modality(model: Model, modality: Modality) -> None:
    """Raise StudyError where a network cannot work on the images of a modality."""
    if modality == "mri":
        if isinstance(model, REDCNN | LPD | TwoBand | IRadonMAP):
            raise StudyError(f"model.kind: {model.kind} is for CT, and these scans are MRI; take modl, unet or learn")
        if isinstance(model, UNet | Learn) and model.conditioned:
            raise StudyError("model.conditioned needs CT, whose scanners have a protocol; set it to false")
    elif isinstance(model, MoDL) and model.image == "complex":
        raise StudyError("model.image: complex is for MRI, and CT images are real; remove it")

"""What of a large network is trained: a few values beside frozen ones."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from wardround.study.base import Config

_ANY = "`*` stands for any text"


class NoAdapters(Config):
    """The network as its task makes it."""

    kind: Literal["none"] = "none"

    def describe(self) -> str:
        """What `check` and the model's card print of it; empty for nothing."""
        return ""


class _Adapted(Config):
    """Everything but what an adapter adds, and what `trained` names, is frozen."""

    trained: tuple[str, ...] = Field(
        (), description=f"values of the network that are trained beside the adapters, such as `head.*`; {_ANY}"
    )

    def _beside(self) -> str:
        return f", and {', '.join(self.trained)}" if self.trained else ""


class LoRA(_Adapted):
    """A product of two small matrices is added to a layer (Hu et al., ICLR 2022), scaled by `alpha / rank`."""

    kind: Literal["lora"]
    targets: tuple[str, ...] = Field(
        min_length=1, description=f"linear and convolutional layers that get one: `*.q_proj`; {_ANY}"
    )
    rank: int = Field(8, ge=1, le=4096, description="columns of the one matrix and rows of the other")
    alpha: float = Field(16.0, gt=0.0, description="the product counts `alpha / rank` times")
    rank_stabilised: bool = Field(
        False, description="the product counts `alpha / sqrt(rank)` times, so that large ranks learn as fast (rsLoRA)"
    )
    factors: Literal["both", "second"] = Field(
        "both",
        description="which factors are trained and exchanged. The mean of the sites' products is not the product of "
        "their mean factors: with `both` (FedIT) the average is biased. `second`: the first factor stays as the "
        "study's seed draws it, alike at all sites, so the average is exact, at half the traffic (FFA-LoRA)",
    )
    local_rank: int = Field(
        0, ge=0, le=4096, description="a second product of this rank stays at each site (dual LoRA); 0 is none"
    )

    def scale(self, rank: int) -> float:
        """How often a product of a rank counts."""
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def describe(self) -> str:
        """Rank, layers and what else is trained."""
        which = " (second factor alone)" if self.factors == "second" else ""
        own = f", and of rank {self.local_rank} at each site" if self.local_rank else ""
        return f"LoRA of rank {self.rank}{which}{own} on {', '.join(self.targets)}{self._beside()}"


class Bottleneck(_Adapted):
    """A narrow network of two layers behind a layer (Houlsby et al., 2019): y + up(gelu(down(y))), `up` zero at first.

    FedMSA (Liu et al., MICCAI 2024) puts such adapters behind the attention and the perceptron of each block of SAM.
    """

    kind: Literal["bottleneck"]
    targets: tuple[str, ...] = Field(
        min_length=1, description=f"layers whose output (..., features) passes through one: `*.attn`; {_ANY}"
    )
    features: int = Field(ge=1, description="values of a token in those outputs")
    width: int = Field(ge=1, description="values in the middle; FedMSA takes a quarter of the features")

    def describe(self) -> str:
        """Width, layers and what else is trained."""
        return f"bottlenecks of {self.width} values behind {', '.join(self.targets)}{self._beside()}"


class Prompts(_Adapted):
    """Learned tokens go before those of an image in every block, and leave behind it (Jia et al., ECCV 2022, "deep").

    FedPR (Feng et al., CVPR 2023) trains and exchanges such prompts alone.
    """

    kind: Literal["prompts"]
    targets: tuple[str, ...] = Field(
        min_length=1, description=f"blocks of tokens (B, N, features) that take any number of them: `blocks.*`; {_ANY}"
    )
    features: int = Field(ge=1, description="values of a token")
    tokens: int = Field(20, ge=1, description="of each block")

    def describe(self) -> str:
        """Number, blocks and what else is trained."""
        return f"{self.tokens} prompts in each of {', '.join(self.targets)}{self._beside()}"


class Partial(Config):
    """Some of the network's own values are trained, such as its norms or its head; all others are frozen."""

    kind: Literal["partial"]
    trained: tuple[str, ...] = Field(min_length=1, description=f"which: `*norm*`, `head.*`; {_ANY}")

    def describe(self) -> str:
        """Which."""
        return f"{', '.join(self.trained)} alone"


Adapters = Annotated[NoAdapters | LoRA | Bottleneck | Prompts | Partial, Field(discriminator="kind")]

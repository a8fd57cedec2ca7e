"""The federated methods that a study can use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from wardround.study.base import Config, Factory


class _Weighted(Config):
    weights: Literal["samples", "equal", "validation"] = Field(
        "samples", description="`validation` is exp(-validation loss), clamped"
    )


class FedAvg(_Weighted):
    """Weighted averaging (McMahan et al., 2017)."""

    kind: Literal["fedavg"] = "fedavg"


class FedProx(_Weighted):
    """A proximal term keeps sites near the global model (Li et al., 2020)."""

    kind: Literal["fedprox"]
    mu: float = Field(0.01, ge=0.0)


class _Personal(Config):
    weights: Literal["samples", "equal", "validation"] = Field(
        "equal", description="`validation` is exp(-validation loss), clamped"
    )
    stranger: Literal["initial", "mean"] = Field(
        "initial",
        description="what a hospital that did not train gets for the private part: its initial values, or the mean of "
        "the sites' private parts. `mean` is a side channel: every round, each site's private part travels as well, "
        "as a further group of the sum; `protection.secure` hides it in the sum like the rest",
    )


class FedBN(_Personal):
    """Batch-norm layers stay at the site (Li et al., 2021).

    A hospital that did not train normalises by its own images; `stranger` is about scales and shifts.
    """

    kind: Literal["fedbn"]
    weights: Literal["samples", "equal", "validation"] = Field(
        "samples", description="`validation` is exp(-validation loss), clamped"
    )


class HyperFed(_Personal):
    """The hypernetwork stays at the site, the network that it conditions is shared (Yang et al., 2023)."""

    kind: Literal["hyperfed"]


class ScanPhysFed(_Personal):
    """Encoder and hypernetwork are shared, the decoder stays at the site (SCAN-PhysFed, Yang et al., 2025).

    The level of scanners; anatomy prompts are the model's: `model: {kind: redcnn, anatomy: {...}}`.
    """

    kind: Literal["scan_physfed"]
    repulsion: float = Field(1e-4, ge=0.0, description="weight of |cos| between the codes of two sites' scanners")


class FedFDD(_Personal):
    """One frequency band is shared, the other stays at the site (after FedFDD, 2024)."""

    kind: Literal["fedfdd"]
    private: Literal["low", "high"] = Field("low", description="the band that stays at the site")


class FedCT(_Personal):
    """The projection-domain part stays at the site, the conditioned image-domain part is shared (FedCT, 2024)."""

    kind: Literal["fedct"]


class FedAvgM(_Weighted):
    """Server momentum (Hsu et al., 2019)."""

    kind: Literal["fedavgm"]
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    server_lr: float = Field(1.0, gt=0.0)


class FedAdam(_Weighted):
    """Adam at the server (Reddi et al., 2021)."""

    kind: Literal["fedadam"]
    server_lr: float = Field(0.001, gt=0.0)
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.99, ge=0.0, lt=1.0)
    tau: float = Field(1e-3, gt=0.0)


class CustomMethod(Config):
    """Your own method: `factory` is an entry point of the group `wardround.methods` that the site allows in
    `plugins`, or `package.module:callable` with `--allow-code`.
    """

    kind: Literal["custom"]
    factory: Factory
    options: dict[str, Any] = Field(default_factory=dict)


Method = Annotated[
    FedAvg | FedProx | FedBN | HyperFed | ScanPhysFed | FedFDD | FedCT | FedAvgM | FedAdam | CustomMethod,
    Field(discriminator="kind"),
]

"""The federated methods that a study can use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from wardround.study.base import Config


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


class FedBN(_Weighted):
    """Batch-norm layers stay at the site (Li et al., 2021)."""

    kind: Literal["fedbn"]


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
    """Your own method: an entry point of the group `wardround.methods`, or `package.module:callable`."""

    kind: Literal["custom"]
    factory: str
    options: dict[str, Any] = Field(default_factory=dict)


Method = Annotated[FedAvg | FedProx | FedBN | FedAvgM | FedAdam | CustomMethod, Field(discriminator="kind")]

"""FedBN: batch-norm layers stay at the site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.personal import Personal, PersonalSettings
from wardround.learning.policy import Parameter, Policy


@dataclass(frozen=True)
class FedBN(Personal):
    """Batch-norm layers, weights and running statistics, stay at the site (Li et al., ICLR 2021).

    At a hospital that did not train, the layers normalise by statistics of its own images (`own_statistics`): those of
    other sites, or none, are of other images. Its scales and shifts are the initial ones, the identity, or the mean of
    the sites' (`unseen="mean"`), which is what the paper proposes for a new hospital. Running statistics never leave.
    """

    own_norm: bool = field(default=True, kw_only=True)
    tells_buffers = False

    def is_private(self, parameter: Parameter) -> bool:
        """Everything that a batch-norm layer owns."""
        return parameter.layer.startswith("BatchNorm")

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """Raises `StudyError` for a model without batch-norm layers: FedBN would silently be FedAvg."""
        if not any(p.layer.startswith("BatchNorm") for p in parameters):
            raise StudyError(
                "method.kind=fedbn needs batch-norm layers, and this model has none; set model.norm: batch"
            )
        return super().policy(parameters)


class FedBNSettings(PersonalSettings):
    """Batch-norm layers stay at the site (Li et al., 2021).

    A hospital that did not train normalises by its own images; `unseen` is about scales and shifts.
    """

    kind: Literal["fedbn"]
    weights: Literal["samples", "equal", "validation"] = Field(
        "samples", description="`validation` is exp(-validation loss), clamped"
    )
    noised = True

    def build(self, protocols: Mapping[str, Any]) -> FedBN:
        """The method."""
        return FedBN(self.weights, self.unseen)

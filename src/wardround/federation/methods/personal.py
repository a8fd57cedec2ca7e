"""Methods that keep a part of the model at the site."""

from __future__ import annotations

from dataclasses import dataclass

from wardround.errors import StudyError
from wardround.federation.methods.method import Method
from wardround.federation.policy import Parameter, Policy, Role


@dataclass(frozen=True)
class FedBN(Method):
    """Batch-norm layers, weights and running statistics, stay at the site (Li et al., ICLR 2021).

    A site that did not train gets the layers as they were initialised: identity scaling, unit statistics.
    """

    def role(self, parameter: Parameter) -> Role:
        """Local for everything that a batch-norm layer owns."""
        return "local" if parameter.layer.startswith("BatchNorm") else super().role(parameter)

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """Raises `StudyError` for a model without batch-norm layers: FedBN would silently be FedAvg."""
        if not any(p.layer.startswith("BatchNorm") for p in parameters):
            raise StudyError(
                "method.kind=fedbn needs batch-norm layers, and this model has none; set model.norm: batch"
            )
        return super().policy(parameters)

"""FedSA-LoRA: of every low-rank product the second factor stays at the site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wardround.errors import StudyError
from wardround.learning.methods.personal import Personal, PersonalSettings
from wardround.learning.policy import Parameter, Policy
from wardround.models.low_rank import is_second_factor


@dataclass(frozen=True)
class FedSALoRA(Personal):
    """First factors are averaged, second factors stay at the site (Guo et al., ICLR 2025).

    What sites have in common is then exact: their products have the mean first factor, each with a second of its own.
    """

    def is_private(self, parameter: Parameter) -> bool:
        """The second factor of every product."""
        return is_second_factor(parameter.name)

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """Raises `StudyError` where no second factor is trained."""
        if not any(self.is_private(p) and p.trainable for p in parameters):
            raise StudyError(
                "method.kind=fedsa_lora keeps the second factors of LoRA, and there are none; set adapters.kind: lora"
            )
        return super().policy(parameters)


class FedSALoRASettings(PersonalSettings):
    """Of every low-rank product the first factor is averaged, and the second stays at the site (Guo et al., 2025)."""

    kind: Literal["fedsa_lora"]

    def build(self, protocols: Mapping[str, Any]) -> FedSALoRA:
        """The method."""
        return FedSALoRA(self.weights, self.unseen)

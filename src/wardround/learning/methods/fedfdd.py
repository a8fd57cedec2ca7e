"""FedFDD: one of two frequency bands stays at the site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from wardround.learning.methods.personal import Personal, PersonalSettings
from wardround.learning.policy import Parameter


@dataclass(frozen=True)
class FedFDD(Personal):
    """One of two frequency bands has its network shared, the other keeps it at the site (after FedFDD, MIDL 2024).

    Which band the paper keeps private was not read: the study chooses.
    """

    private: Literal["low", "high"] = "low"
    parts = ("low.", "high.")
    remedy = "model.kind: two_band"

    def is_private(self, parameter: Parameter) -> bool:
        """The network of the private band."""
        return parameter.name.startswith(f"{self.private}.")


class FedFDDSettings(PersonalSettings):
    """One frequency band is shared, the other stays at the site (after FedFDD, 2024)."""

    kind: Literal["fedfdd"]
    private: Literal["low", "high"] = Field("low", description="the band that stays at the site")

    def build(self, protocols: Mapping[str, Any]) -> FedFDD:
        """The method."""
        return FedFDD(self.weights, self.unseen, private=self.private)

    def describe(self) -> str:
        """With the band."""
        return f"{self.kind}, the {self.private} band stays"

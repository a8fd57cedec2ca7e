"""FedCT: what works on projections stays at the site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wardround.learning.methods.personal import Personal, PersonalSettings
from wardround.learning.policy import Parameter


@dataclass(frozen=True)
class FedCT(Personal):
    """What works on projections stays at the site, what works on images is shared and conditioned (FedCT, 2024).

    Projections have the geometry of one scanner, images have that of the body.
    """

    parts = ("projection.", "image.", "hypernetwork.")
    remedy = "model: {kind: iradonmap, conditioned: true}"

    def is_private(self, parameter: Parameter) -> bool:
        """The projection-domain module."""
        return parameter.name.startswith("projection.")


class FedCTSettings(PersonalSettings):
    """The projection-domain part stays at the site, the conditioned image-domain part is shared (FedCT, 2024)."""

    kind: Literal["fedct"]

    def build(self, protocols: Mapping[str, Any]) -> FedCT:
        """The method."""
        return FedCT(self.weights, self.unseen)

"""HyperFed: the hypernetwork stays at the site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wardround.learning.methods.personal import Personal, PersonalSettings
from wardround.learning.policy import Parameter


@dataclass(frozen=True)
class HyperFed(Personal):
    """The hypernetwork stays at the site, the network that it conditions is shared (Yang et al., TNNLS 2023).

    The paper weighs all sites alike.
    """

    parts = ("hypernetwork.",)
    remedy = "model.conditioned: true (model.kind: redcnn has model.conditioning: every instead)"

    def is_private(self, parameter: Parameter) -> bool:
        """The hypernetwork."""
        return parameter.name.startswith("hypernetwork.")


class HyperFedSettings(PersonalSettings):
    """The hypernetwork stays at the site, the network that it conditions is shared (Yang et al., 2023)."""

    kind: Literal["hyperfed"]

    def build(self, protocols: Mapping[str, Any]) -> HyperFed:
        """The method."""
        return HyperFed(self.weights, self.unseen)

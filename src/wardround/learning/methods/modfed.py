"""ModFed: the first part of the network is shared, and sites whose model does badly count more in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.encoder import SharesEncoder, SharesEncoderSettings
from wardround.learning.methods.method import Facts, Measured


@dataclass(frozen=True)
class ModFed(SharesEncoder):
    """Adaptive dynamic aggregation (Wu et al., Computers in Biology and Medicine 2024).

    theta = sum over sites of softmax_k(L) theta_k, L_k being the loss of site k's trained model on its own validation
    patients: the harder site counts more. Of nine convolutions the paper shares six; the rest, and what weighs data
    against the prior, stay at the site.

    A softmax as a sum: a site's weight is exp(L_k - most), and the coordinator divides by the sum of all, which cancels
    `most`. Losses beyond `most` in size count as it. L_k is of this round's model; the authors' code takes that of the
    round before, after it was averaged. Without validation patients a site has no weight, and an error says so.

    The paper's loss of a step, |x' - x|^2 + 0.1 L, adds the loss L that the global model of the round before had on the
    site's validation patients: a number, which has no gradient and moves nothing. With a gradient it would train on
    validation patients, whose losses then measured nothing. It is left out.
    """

    most: float = 2.0

    @property
    def measures(self) -> Measured:
        """The weight."""
        return Measured(
            "its weight, which method.kind=modfed makes from the loss of its validation patients",
            "Choose another method",
        )

    @property
    def discloses(self) -> str:
        """The loss that the weight says."""
        more = super().discloses
        return (
            "the loss of its trained model on its validation patients, once a round, which its weight says, as one of "
            "the sum" + (f"; {more}" if more else "")
        )

    def weight(self, facts: Facts) -> float:
        """exp(L - most). Raises `StudyError` for a site without validation patients."""
        if facts.validation_loss is None:
            raise StudyError(
                "method.kind=modfed weighs by validation loss and needs a validation patient at every site"
            )
        return math.exp(min(max(facts.validation_loss, -self.most), self.most) - self.most)

    def least_weights(self, samples: int, groups: tuple[str, ...]) -> dict[str, float]:
        """Those of the smallest loss."""
        return self.group_weights(Facts(samples, -self.most), groups)


class ModFedSettings(SharesEncoderSettings):
    """The first layers are shared, and the site whose loss is higher counts more (ModFed, Wu et al., 2024)."""

    kind: Literal["modfed"]
    weights: Literal["validation"] = Field("validation", description="softmax of validation losses")
    largest_loss: float = Field(
        2.0,
        gt=0.0,
        le=8.0,
        description="validation losses above it count as it; the smaller, the more digits weights have",
    )

    def build(self, protocols: Mapping[str, Any]) -> ModFed:
        """The method."""
        return ModFed("validation", self.unseen, self.encoder, most=self.largest_loss)

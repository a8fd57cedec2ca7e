"""FedMRI: the encoder is shared, the decoder stays, and encoders are drawn to their mean and away from each other's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from wardround.learning.methods.encoder import SharesEncoder, SharesEncoderSettings
from wardround.learning.methods.method import MODEL, Array, LocalRound, Updates, Writers, state_name
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.protection import NoCompression
from wardround.wire.update import Aggregate, Group

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wardround.study.schema import Study

# What is broadcast beside the model: the sites' encoders of the round before, and of how many sites they are.
PREVIOUS, COUNT = "previous", "previous_sites"
# Of the equation: where no site has moved, the quotient is 0 and not undefined.
_EPSILON = 1e-14


@dataclass(frozen=True)
class FedMRI(SharesEncoder):
    """Shared encoder, local decoder (Feng et al., IEEE TMI 2022), sites weighed alike, without the regulariser."""


@dataclass(frozen=True)
class ContrastiveFedMRI(FedMRI):
    """FedMRI with its weighted contrastive regularisation, from the second round on.

    The loss of a step at site k gets contrast x |theta_k - theta_G|_1 / (sum_j |theta_k - theta_j|_1 + 1e-14). theta_k
    is what learns of the encoder in the step, theta_G the shared encoder of the round's start, theta_j the encoder
    that site j sent in the round before, before it was averaged; j is over all sites of that round, site k included.
    Gradients go through numerator and denominator.

    Where theta_k is theta_G, as in the first step of a round, the term and its gradient are 0. The authors' code leaves
    it out in the first batch of each epoch: of the first epoch that is the same, and later ones have it here.

    So each site's encoder goes to every other: the coordinator broadcasts them, in the clear, and a round's downward
    traffic is the encoder 1 + n times for n sites. A site computes with n copies more.
    """

    needs: ClassVar[Literal["sum", "updates"]] = "updates"
    side_channels: ClassVar[frozenset[str]] = frozenset({PREVIOUS, COUNT})
    contrast: float = 100.0
    #: The sites of the arm, for which the broadcast has room.
    sites: int = 1

    def within(self, study: Study, sites: int, model: nn.Module) -> Self:
        """With the number of the arm's sites."""
        return replace(super().within(study, sites, model), sites=sites)

    @property
    def copies(self) -> int:
        """The encoders of all sites."""
        return self.sites

    @property
    def discloses(self) -> str:
        """The encoder of each site, and to whom."""
        more = super().discloses
        return (
            "its encoder as it is after the round (method.kind: fedmri, method.contrast): the coordinator reads it, "
            "and all sites in the next round" + (f"; {more}" if more else "")
        )

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Before round 1 there is room for the sites' encoders, and none."""
        public, private = super().initial(groups, values)
        for group in groups:
            for info in group.tensors if group.name == MODEL else ():
                public[state_name(PREVIOUS, info.name)] = np.zeros((self.sites, *info.shape), np.float32)
        return {**public, state_name(COUNT, COUNT): np.zeros(1, np.float32)}, private

    def begin(self, local: LocalRound) -> None:
        """Bring the encoders of the round before to where the site computes."""
        count = int(np.asarray(local.public[state_name(COUNT, COUNT)])[0])
        for name in local.trainable() if count else ():
            local.scratch[state_name(PREVIOUS, name)] = local.received(state_name(PREVIOUS, name))[:count]

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss with the regulariser, over what learns of the encoder."""
        near: Tensor | float = 0.0
        far: Tensor | float = _EPSILON
        for name, tensor in local.trainable().items():
            if (previous := local.scratch.get(state_name(PREVIOUS, name))) is None:
                return loss
            near = near + (tensor - local.anchor[name]).abs().sum()
            far = far + (tensor - previous).abs().sum()
        return loss + self.contrast * near / far

    def apply(
        self, public: Mapping[str, Array], private: Mapping[str, Array], aggregate: Aggregate, write: Writers
    ) -> None:
        """The mean encoder; and each site's, for the next round."""
        assert isinstance(aggregate, Updates), "needs = updates"
        super().apply(public, private, aggregate, write)
        count = 0
        for group in aggregate.layout.groups:
            for info in group.tensors if group.name == MODEL else ():
                moved = public[state_name(MODEL, info.name)] + aggregate.each(MODEL, info.name)
                count, room = len(moved), np.zeros((self.sites, *info.shape), np.float32)
                room[:count] = moved
                write.public(state_name(PREVIOUS, info.name), room)
        write.public(state_name(COUNT, COUNT), np.full(1, count, np.float32))

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """The encoder is averaged, after steps that the optimiser bounds."""
        return local if self.moves_as(ContrastiveFedMRI) else UNKNOWN


class FedMRISettings(SharesEncoderSettings):
    """The encoder is shared, the decoder stays at the site, encoders are contrasted (Feng et al., 2022)."""

    kind: Literal["fedmri"]
    noised = True
    contrast: float = Field(
        100.0,
        ge=0.0,
        description="beta of the paper, whose images have a standard deviation of 1. A side channel: all sites read "
        "each site's encoder, every round. 0 leaves the regulariser out, and the method is one of sums",
    )

    def check(self, study: Study) -> None:
        """Encoders that all sites read are neither in a sum nor without age."""
        protection = study.protection
        against = {
            "protection.secure, which hides it in a sum": protection.secure,
            "protection.privacy, whose budget is for what the coordinator reads": protection.privacy is not None,
            "protection.robust, which trusts no single site's": protection.robust is not None,
            "protection.compression, which sends it in part": not isinstance(protection.compression, NoCompression),
            "schedule.asynchronous, whose rounds have encoders of several": study.schedule.asynchronous is not None,
        }
        for key, given in against.items():
            if self.contrast and given:
                raise ValueError(
                    "method.contrast: each site's encoder of the round before goes to every site, so "
                    f"method.kind={self.kind} cannot be combined with {key}; set method.contrast to 0, or leave that "
                    "out"
                )

    def build(self, protocols: Mapping[str, Any]) -> FedMRI:
        """The method."""
        if not self.contrast:
            return FedMRI(self.weights, self.unseen, self.encoder)
        return ContrastiveFedMRI(self.weights, self.unseen, self.encoder, contrast=self.contrast)

    def describe(self) -> str:
        """With the regulariser's weight."""
        return f"{self.kind}, contrast {self.contrast:g}"

"""Elastic weight consolidation: a quadratic pull to a released model, as strong as its Fisher information says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.learning.methods.method import LocalRound

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Pull:
    """Adds weight / 2 x sum_j F_j (w_j - w_release,j)^2 to a step's loss (Kirkpatrick et al., PNAS 2017, eq. 3).

    The sum is over the shared weights that gradients reach; w_release is what the study starts from. It knows no data
    of the site, so with privacy it comes on top of the noised gradient, like a method's own term.
    """

    weight: float
    #: By model name: the shape of the weight.
    fisher: Mapping[str, Array]
    _placed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def on(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss of a step, with the pull."""
        for name, tensor in local.trainable().items():
            fisher, release = self._on(local, name, tensor)
            loss = loss + 0.5 * self.weight * (fisher * (tensor - release).square()).sum()
        return loss

    def _on(self, local: LocalRound, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """A weight's Fisher information and released value where the site computes, brought there once."""
        found = self._placed.get(name)
        if found is None or found[0].device != like.device:
            fisher = torch.from_numpy(self.fisher[name]).to(like)
            found = self._placed[name] = fisher, local.initial[name].detach().to(like)
        return found

"""FedPR: deep prompts alone are trained and exchanged, in steps that leave alone what the common ones say already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.method import MODEL, Array, Floats, LocalRound, Method, state_name
from wardround.learning.policy import Parameter, Policy, Role
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import WeightedSettings
from wardround.study.start import Fresh

if TYPE_CHECKING:
    from wardround.study.schema import Study

#: Of networks with prompts of their own, and of `adapters.kind: prompts`.
PROMPTS = ("*.prompts", "*.prompt.weight")
_SPACE, _BEFORE = "space/", "before/"


@dataclass(frozen=True)
class FedPR(Method):
    """Federated visual prompts in the null space of the global prompt (Feng et al., CVPR 2023).

    Prompts P (tokens, d) of each block are averaged by training examples; everything else is frozen, in every arm of
    the study. From round 2 on, with the prompts that the round began with: C = P^T P = U S U^T, U_0 are the columns of
    U but for the first floor((1 - ratio) d), those of the largest values, and T = U_0 U_0^T / |U_0 U_0^T|_F. A step
    moves P by dP T, where dP is what the optimiser would move it by: the *step* is projected and not the gradient, of
    which Adam would make a step that is in the null space no more. T has a spectral norm of 1 / sqrt(d - dropped), so
    that steps are shorter by it than those of round 1, which has no global prompt yet and takes whole ones.

    Where P has fewer directions than would be dropped, only those are: which of the others come first, an algorithm for
    singular values chooses at random. (1 - ratio) d is rounded down after rounding errors are taken off, which at
    ratio 0.8 made 0 of 1 in the authors' code, for d = 5. Each site projects by the prompts that it was sent, while
    that code keeps older ones at sites which sat out a round.

    T follows from the broadcast: nothing more is sent. A hospital that did not train gets the same model.
    """

    # The prompts before a step.
    holds = 1
    prompts: tuple[str, ...] = PROMPTS
    ratio: float = 0.8

    def role(self, parameter: Parameter) -> Role:
        """Shared for prompts, frozen for everything else."""
        named = any(fnmatchcase(parameter.name, pattern) for pattern in self.prompts)
        return "shared" if named and parameter.trainable else "frozen"

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """Raises `StudyError` for a model without prompts."""
        if not any(self.role(p) == "shared" for p in parameters):
            raise StudyError(
                "method.kind=fedpr trains prompts alone, and the model has none that learn; set `model.prompts` of a "
                "network that has them, or `adapters: {kind: prompts, ...}`, or name them as method.prompts"
            )
        return super().policy(parameters)

    def begin(self, local: LocalRound) -> None:
        """Find the null space of each prompt that the round begins with; round 1 has none."""
        import torch

        for name, tensor in local.trainable().items() if local.number > 1 else ():
            space = null_space(np.asarray(local.public[state_name(MODEL, name)]), self.ratio)
            local.scratch[_SPACE + name] = torch.from_numpy(space).to(tensor)

    def begin_step(self, local: LocalRound) -> None:
        """Remember where the step begins."""
        for name, tensor in local.trainable().items():
            local.scratch[_BEFORE + name] = tensor.detach().clone()

    def end_step(self, local: LocalRound) -> None:
        """Put dP T in the place of dP."""
        import torch

        with torch.no_grad():
            for name, tensor in local.trainable().items():
                if (space := local.scratch.get(_SPACE + name)) is not None:
                    before = local.scratch[_BEFORE + name]
                    tensor.copy_(before + (tensor - before) @ space)

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """A projected step is shorter; one value of it goes at most sqrt(d / kept) as far as all could."""
        return local.times(1.0 / math.sqrt(self.ratio)) if self.moves_as(FedPR) else UNKNOWN


def null_space(prompt: Array, ratio: float) -> Floats:
    """T (d, d) of a prompt (..., d): the projector on all but the largest right-singular directions, over its norm."""
    rows = np.asarray(prompt, np.float64).reshape(-1, prompt.shape[-1])
    width = rows.shape[1]
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    # What single precision makes of a direction that is not there.
    there = int((values > values.max(initial=0.0) * max(rows.shape) * np.finfo(np.float32).eps).sum())
    dropped = directions[: min(there, math.floor((1.0 - ratio) * width + 1e-9))]
    projector: Floats = np.eye(width) - dropped.T @ dropped
    return projector / np.linalg.norm(projector)


class FedPRSettings(WeightedSettings):
    """Deep prompts of a trained network, and nothing else of it, learn and travel (FedPR, Feng et al., 2023)."""

    kind: Literal["fedpr"]
    noised = True
    late = True
    prompts: tuple[str, ...] = Field(
        PROMPTS, min_length=1, description="patterns of the prompts, `*` stands for any text; everything else is frozen"
    )
    ratio: float = Field(
        0.8,
        gt=0.0,
        le=1.0,
        description="share of a prompt's directions that steps keep to: those it uses least",
    )

    @property
    def only(self) -> tuple[str, ...]:
        """The prompts."""
        return self.prompts

    def check(self, study: Study) -> None:
        """Prompts steer a network that has learned."""
        if isinstance(study.start, Fresh):
            raise ValueError(
                f"method.kind={self.kind} freezes all but prompts, and the study begins with an untrained network; "
                "name a trained one in `start`"
            )

    def build(self, protocols: Mapping[str, Any]) -> FedPR:
        """The method."""
        return FedPR(self.weights, prompts=self.prompts, ratio=self.ratio)

    def describe(self) -> str:
        """With the share."""
        return f"{self.kind}, ratio {self.ratio:g}"

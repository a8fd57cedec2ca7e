"""FedGIMP: sites share a generator of images that knows whose they are; discriminators stay where they learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.method import LocalRound
from wardround.learning.methods.personal import Personal
from wardround.learning.policy import Parameter
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import MethodSettings

if TYPE_CHECKING:
    from torch import nn

    from wardround.study.schema import Study

_CODE = "code"


@dataclass(frozen=True)
class FedGIMP(Personal):
    """Federated learning of a generative image prior (Elmas et al., IEEE TMI 2023; `models.generative_prior`).

    The generator, mapper and synthesiser, is averaged; each site keeps a discriminator of its own, and its code, the
    place of the site among the training sites, which conditions the generator. Nothing of either is sent. A hospital
    that did not train has all codes in even shares: it starts at the mean of the sites' mean latents.
    """

    parts = ("discriminator.",)
    remedy = "model: {kind: generative_prior}"
    sites: tuple[str, ...] = ()

    def is_private(self, parameter: Parameter) -> bool:
        """Discriminator and code."""
        return parameter.name.startswith(self.parts) or parameter.name == _CODE

    def within(self, study: Study, sites: int, model: nn.Module) -> FedGIMP:
        """With the training sites. Raises `StudyError` where the network has not as many codes."""
        training = study.training_sites
        found = len(getattr(model, _CODE, ()))
        if found and found != len(training):
            raise StudyError(
                f"model.codes: the generator has {found} site codes, and the study {len(training)} training sites; set "
                f"model.codes to {len(training)}"
            )
        if without := [site for site in training if study.supervision_of(site).splits]:
            raise StudyError(
                f"sites.{without[0]}.supervision: method.kind=fedgimp learns from true images, and this site learns "
                "from measured samples; choose another method"
            )
        return replace(self, sites=training)

    def begin(self, local: LocalRound) -> None:
        """The site's code is its own."""
        code = local.private.get(_CODE)
        if code is not None and local.site in self.sites:
            code.detach().zero_()
            code.detach()[self.sites.index(local.site)] = 1.0

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """The generator is averaged."""
        return local if self.moves_as(FedGIMP) else UNKNOWN


class FedGIMPSettings(MethodSettings):
    """A shared generator of images against discriminators that stay at their sites (Elmas et al., 2023).

    For `model.kind: generative_prior`.
    """

    late = True
    kind: Literal["fedgimp"]
    weights: Literal["samples", "equal"] = Field("equal", description="as in the paper: `equal`")

    def build(self, protocols: Mapping[str, Any]) -> FedGIMP:
        """The method."""
        return FedGIMP(self.weights)

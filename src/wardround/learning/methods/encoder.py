"""Methods that share the encoder of a network; all that follows it stays at the site."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.personal import Personal, PersonalSettings
from wardround.learning.policy import Parameter, Policy, matching

if TYPE_CHECKING:
    from torch import nn

    from wardround.study.schema import Study


@dataclass(frozen=True)
class SharesEncoder(Personal):
    """The encoder is averaged, the rest of the network stays at the site.

    Which parameters and buffers are the encoder, the network's own modules say (`wardround.models.encoder`), or
    `encoder` by patterns. A hospital that did not train gets an untrained rest, or the mean of the sites' (`unseen`).
    """

    encoder: tuple[str, ...] = ()
    #: The names of the encoder in the network's state.
    names: frozenset[str] = frozenset()

    def within(self, study: Study, sites: int, model: nn.Module) -> Self:
        """With the names of the study's network. Raises `StudyError` where it is not known which they are."""
        # Late: a coordinator reads methods without torch.
        from wardround.models.encoder import encoder_of

        if self.encoder:
            names = matching(self.encoder, tuple(model.state_dict()), "method.encoder")
        elif not (names := encoder_of(model)):
            raise StudyError(
                f"method.kind={study.method.kind} shares the encoder of a network, and of this one it is not known; "
                "name its parameters with `method.encoder: [PATTERN]`, or choose another method"
            )
        return replace(self, names=names)

    def is_private(self, parameter: Parameter) -> bool:
        """Whether a parameter or buffer is of what follows the encoder."""
        return parameter.name not in self.names

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """Raises `StudyError` where nothing that learns follows the encoder: the method would silently be FedAvg."""
        if not any(self.is_private(p) and p.trainable for p in parameters):
            raise StudyError(
                f"{type(self).__name__} keeps at each site what follows the encoder, and nothing that learns does; let "
                "method.encoder match fewer parameters, or choose another method"
            )
        return super().policy(parameters)


class SharesEncoderSettings(PersonalSettings):
    """A method that shares the encoder."""

    encoder: tuple[str, ...] = Field(
        (),
        description="patterns of the parameters that are shared, `*` stands for any text: `encoder.*`; all others stay "
        "at the site. Default: what the network knows as its encoder, of a stack of convolutions the first two thirds",
    )

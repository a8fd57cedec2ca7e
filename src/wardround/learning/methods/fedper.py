"""FedPer: the head of the network stays at the site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.personal import Personal, PersonalSettings
from wardround.learning.policy import Parameter, Policy, matching


@dataclass(frozen=True)
class FedPer(Personal):
    """The body is averaged, the head stays at the site; both learn together (Arivazhagan et al., 2019).

    Which parameters are the head, the model's settings say (`ModelSettings.head_parts`), or `head` by patterns. A
    hospital that did not train gets an untrained head, or the mean of the sites' heads (`unseen`).
    """

    head: tuple[str, ...] = ()

    def is_private(self, parameter: Parameter) -> bool:
        """Whether a parameter or buffer is of the head."""
        if not self.head:
            return parameter.head
        return any(fnmatchcase(parameter.name, pattern) for pattern in self.head)

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """Raises `StudyError` where the model has no head that learns: the method would silently be FedAvg."""
        matching(self.head, [p.name for p in parameters], "method.head")
        if not any(self.is_private(p) and p.trainable for p in parameters):
            what = "what `method.head` names does not learn" if self.head else "of this model it is not known"
            raise StudyError(
                f"{type(self).__name__} keeps the head of the network at each site, and {what}; name the parameters "
                "that are to stay there with `method.head: [PATTERN]`, or choose another method"
            )
        return super().policy(parameters)


_HEAD = (
    "patterns of the parameters that stay at the site, `*` stands for any text: `classifier.*`. Default: what the "
    "model's kind knows as its head"
)


class FedPerSettings(PersonalSettings):
    """The head stays at the site, the body is shared (Arivazhagan et al., 2019)."""

    kind: Literal["fedper"]
    head: tuple[str, ...] = Field((), description=_HEAD)
    noised = True

    def build(self, protocols: Mapping[str, Any]) -> FedPer:
        """The method."""
        return FedPer(self.weights, self.unseen, self.head)

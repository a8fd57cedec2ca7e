"""One network for many scanners: a hypernetwork turns a scanner's protocol into scales and shifts of feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.study.models import PresetSettings
from wardround.study.tasks import Modality

FEATURES = 7  # of `wardround.imaging.acquisition.ct.scanners.protocol_features`
HIDDEN = (64, 64)
Hidden = Annotated[
    tuple[Annotated[int, Field(ge=1, le=4096)], ...],
    Field(min_length=1, max_length=8, description="the hypernetwork's hidden layers"),
]
CONDITIONED = "CT only: a hypernetwork tells every layer the scanner's protocol"


class ConditionedSettings(PresetSettings):
    """A network whose layers a hypernetwork can tell the scanner's protocol."""

    conditioned: bool = Field(False, description=CONDITIONED)
    hidden: Hidden = HIDDEN

    def check(self, modality: Modality) -> None:
        """Only scanners of CT have a protocol."""
        if modality != "ct" and self.conditioned:
            raise StudyError("model.conditioned needs CT, whose scanners have a protocol; set it to false")

    def describe(self) -> str:
        """Kind, size and whether it knows the scanner."""
        return f"{super().describe()}{', conditioned' if self.conditioned else ''}"


@dataclass(frozen=True)
class FiLM:
    """Feature-wise linear modulation, h -> (1 + gamma) h + beta (Perez et al., AAAI 2018).

    gamma, beta: (C,) for all images alike, or (B, C) for each its own; h: (B, C, H, W).
    """

    gamma: Tensor
    beta: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        return h * (1 + self.gamma[..., None, None]) + self.beta[..., None, None]


Modulation = Mapping[str, FiLM]  # by the name of the block; a block that has no entry is left alone


class ProtocolHyperNet(nn.Module):
    """A perceptron from a protocol's features to one `FiLM` for every named block.

    blocks: channels by name; an unrolled network names blocks as torch names modules, `proxes.3.0`. After HyperFed
    (Yang et al., TNNLS 2023) and SCAN-PhysFed (Yang et al., CVPR 2025), which scale by gamma itself and start it at
    random: there, every new site starts with features scaled at random. Here the last layer starts at zero, so an
    untrained hypernetwork changes nothing, and a site that has not trained its own yet has the plain network.
    """

    def __init__(self, blocks: Mapping[str, int], *, features: int = FEATURES, hidden: Sequence[int] = HIDDEN) -> None:
        super().__init__()
        self._blocks = dict(blocks)
        sizes = (features, *hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        last = nn.Linear(sizes[-1], 2 * sum(self._blocks.values()))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, protocol: Tensor) -> dict[str, FiLM]:
        """Features (F,) or (B, F) in [0, 1] -> modulations by block, of (C,) or (B, C)."""
        channels = list(self._blocks.values())
        gammas, betas = (half.split(channels, -1) for half in self.layers(protocol).chunk(2, -1))
        return {name: FiLM(*pair) for name, *pair in zip(self._blocks, gammas, betas, strict=True)}


def modulation(hypernetwork: ProtocolHyperNet | None, operator: LinearOperator, like: Tensor) -> Modulation:
    """What a model's hypernetwork makes of this scanner, in the dtype and on the device of `like`.

    Nothing for a model without one. Raises StudyError where the operator has no protocol.
    """
    if hypernetwork is None:
        return {}
    if operator.protocol is None:
        raise StudyError("a conditioned model needs CT, whose scanners have a protocol; set model.conditioned: false")
    films: dict[str, FiLM] = hypernetwork(operator.protocol.to(like.real))
    return films


def within(films: Modulation, name: str) -> Modulation:
    """The modulations of one module's blocks, by their names inside it."""
    prefix = f"{name}."
    return {block.removeprefix(prefix): film for block, film in films.items() if block.startswith(prefix)}


def prefixed(name: str, blocks: Mapping[str, int]) -> dict[str, int]:
    """The blocks of a module as its parent names them: the inverse of `within`."""
    return {f"{name}.{block}": channels for block, channels in blocks.items()}


def modulated(h: Tensor, films: Modulation, name: str) -> Tensor:
    """Feature maps (B, C, H, W) after the block's modulation, if it has one."""
    return films[name](h) if name in films else h

"""What every network says of itself in a study; each network's own settings are in its file.

`wardround.study.registry` lists the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from wardround.study.base import Settings
from wardround.study.tasks import Modality

Preset = Literal["tiny", "small", "paper"]


@dataclass(frozen=True)
class Layer:
    """A module of a network by its name, and whether what goes into it or what comes out of it is meant."""

    name: str
    side: Literal["input", "output"] = "output"


class ModelSettings(Settings):
    """The base of every model's section: `build` makes the network."""

    #: What scans it works on; `None`: on any, by their operator.
    modalities: ClassVar[frozenset[Modality] | None] = None
    #: Patterns of the parameters that are its head (methods that keep it at each site); empty where it has none.
    head_parts: ClassVar[tuple[str, ...]] = ()
    #: Whether it holds its images to the measured data (data consistency), as training on one scan alone needs.
    consistent: ClassVar[bool] = False
    #: Whether it takes k-space on a Cartesian grid alone.
    cartesian: ClassVar[bool] = False

    def build(self, modality: Modality) -> Any:
        """The network (`torch.nn.Module`), freshly initialised from torch's global generator.

        Its signature is `forward(operator, data) -> images (B, H, W)`, complex for MRI and real for all others.
        """
        raise NotImplementedError

    def check(self, modality: Modality) -> None:
        """Raise `StudyError` where it cannot work on one of its modalities as it is set."""

    def check_size(self, size: Sequence[int]) -> None:
        """Raise `StudyError` where a network for images (`task.size`) cannot see such as it is set."""

    @property
    def prompt_dimension(self) -> int | None:
        """Values of the embedding of a patient that it takes; `None` for a network that takes none."""
        return None

    @property
    def represents(self) -> Layer | None:
        """Where the network has what it says of an image as a whole: (B, F), tokens (B, T, F) or (B, F, *places).

        `None` for a network that has no such layer.
        """
        return None

    @property
    def real_images(self) -> bool:
        """Whether it takes the images of MRI for real, so that coil maps have to carry their phase."""
        return False


class PresetSettings(ModelSettings):
    """A model with sizes to choose from."""

    preset: Preset = "small"

    def describe(self) -> str:
        """Kind and size."""
        return f"{self.kind}, preset {self.preset}"


class ClassifierSettings(PresetSettings):
    """The base of networks that classify images; they know no scanner."""

    modalities: ClassVar[frozenset[Modality] | None] = frozenset()

    def build_classifier(self, dimensions: int, channels: int, classes: int) -> Any:
        """The network, freshly initialised: (B, channels, *size) -> (B, classes)."""
        raise NotImplementedError


class ClosedModel(ModelSettings):
    """The section of a plug-in's model as the file has it."""

    model_config = ConfigDict(extra="allow")
    closed = True

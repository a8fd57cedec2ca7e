"""What a classical baseline says of itself: it learns nothing, and a study compares with it.

`wardround.study.registry` lists the files of the package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wardround.study.tasks import ClassicalSettings, Modality


@dataclass(frozen=True)
class Baseline:
    """A classical method; its name is the one in the registry, or that of its entry point.

    `reconstruct(operator, data, weight)` makes images (B, H, W), real or complex, of data (B, *data_shape), each item
    on its own. A site's validation patients choose the weight among `weights`, or those `by_modality`; a study gives
    others in its `task.evaluation` under `key`. Without any there is nothing to choose, and the weight is `None`.
    """

    label: str
    description: str
    reconstruct: Callable[[Any, Any, float | None], Any]
    weights: tuple[float, ...] = ()
    by_modality: Mapping[Modality, tuple[float, ...]] = field(default_factory=dict)
    key: str = ""
    #: What it works on; `None`: on any operator.
    modalities: frozenset[Modality] | None = None
    #: Whether it takes images of MRI for real, so that coil maps have to carry their phase.
    real_images: bool = False
    #: The look of one of the package's own in the report; all others have spare ones.
    style: str = ""

    def __post_init__(self) -> None:
        if self.key and self.key not in ClassicalSettings.model_fields:
            raise ValueError(f"the baseline {self.label!r} takes weights from task.evaluation.{self.key}: no such key")

    def serves(self, modality: Modality) -> bool:
        """Whether it works on what a modality measures."""
        return self.modalities is None or modality in self.modalities

    def parameters(self, settings: ClassicalSettings, modality: Modality) -> tuple[float | None, ...]:
        """The weights among which validation patients choose; `(None,)` where there is nothing to choose."""
        given: tuple[float, ...] | None = getattr(settings, self.key) if self.key else None
        return (self.by_modality.get(modality, self.weights) if given is None else given) or (None,)

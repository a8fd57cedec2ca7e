"""The classical methods that a study's images are compared with: they learn nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wardround.errors import StudyError
from wardround.study.baselines import Baseline
from wardround.study.registry import BASELINES, baseline, check_baseline
from wardround.study.tasks import ClassicalSettings, Modality

#: Images (B, H, W), real or complex, of an operator and its data.
Method = Callable[[Any, Any], Tensor]


class ClassicalMethods:
    """By name, the package's own and those `outside` it; `settings` give their weights."""

    def __init__(self, settings: ClassicalSettings, modality: Modality) -> None:
        self._settings = settings
        self._modality = modality
        self._outside: dict[str, Baseline] = {}

    def add(self, baselines: Mapping[str, Baseline]) -> None:
        """Take those of packages outside from these, in place of what was taken before."""
        self._outside = {name: found for name, found in baselines.items() if name not in BASELINES}

    def parameters(self, name: str) -> tuple[float | None, ...]:
        """The weights among which validation patients choose; (None,) where there is nothing to choose."""
        return self._named(name).parameters(self._settings, self._modality)

    def method(self, name: str, parameter: float | None) -> Method:
        """A method with its weight, if it has any, without gradients.

        Raises StudyError for a name that is none, ValueError where a weight is missing.
        """
        found = self._named(name)
        if parameter is None and self.parameters(name) != (None,):
            raise ValueError(f"the baseline {name} needs a weight")

        def reconstruct(operator: Any, data: Any) -> Tensor:
            with torch.no_grad():
                image: Tensor = found.reconstruct(operator, data, parameter)
            return image

        return reconstruct

    def _named(self, name: str) -> Baseline:
        if name in self._outside:
            return self._outside[name]
        if name not in BASELINES:
            raise StudyError(f"there is no baseline {name!r}; choose from {', '.join((*BASELINES, *self._outside))}")
        found = baseline(name)
        check_baseline(name, found, self._modality)
        return found

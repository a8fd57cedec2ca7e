"""The model section of a task that builds its network itself."""

from __future__ import annotations

from typing import Literal

from wardround.study.models import ModelSettings


class OwnModel(ModelSettings):
    """The network that the task builds by itself."""

    kind: Literal["own_network"]
    modalities = frozenset()

    def describe(self) -> str:
        """Whose it is."""
        return "the task's own"

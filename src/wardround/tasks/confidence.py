"""What a network says of a batch as probabilities, beside what is true: for tasks that outline or name classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Said:
    """Probabilities (B, K, *shape), and the truth of the same shape: 1, 0, or NaN where it is not known.

    `exclusive` where one of the K is true, else each is by itself.
    """

    probabilities: Tensor
    truth: Tensor
    exclusive: bool


@runtime_checkable
class Confident(Protocol):
    """A task whose networks say how sure they are."""

    def said(self, model: nn.Module, batch: Any) -> Said:
        """What the network says of a batch of an evaluation, in evaluation mode."""
        ...

"""What optimisers at the coordinator share: the mean change is a pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.learning.methods.method import MODEL, state_name

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Keep = Callable[[str, Array], None]


def is_trained(name: str) -> bool:
    """Whether a tensor of the state is what gradients reach."""
    # Buffers such as running statistics are no gradients: they are averaged.
    return name.startswith(state_name(MODEL, ""))


def slot(private: Mapping[str, Array], name: str, like: Floats) -> Floats:
    """What the coordinator kept under a name; zeros before the first round."""
    return private[name] if name in private else np.zeros_like(like)

"""What methods with a state or sums of their own at the coordinator share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wardround.learning.methods.method import MODEL, state_name

if TYPE_CHECKING:
    from wardround.study.schema import Study

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


def refuse_robust(kind: str, study: Study) -> None:
    """Raise `ValueError` where a robust mean takes the place of the sums that a method is made of."""
    if study.protection.robust is not None:
        raise ValueError(
            f"method.kind={kind} is made of sums over sites, and protection.robust leaves parts of them out; leave out "
            "protection.robust"
        )

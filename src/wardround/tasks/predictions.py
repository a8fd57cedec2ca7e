"""What a released model says of one image: outlines of structures, or probabilities of classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Masks:
    """Outlined structures: `marked` is bool (K, *shape), a mask of the image's grid for each of `names`; they overlap.

    `images` (C, *shape) is what a network that reconstructs made of the scans and outlined, None where it saw images.

    >>> import numpy as np
    >>> masks = Masks(("organ", "tumour"), np.array([[[True, True, False]], [[False, True, False]]]))
    >>> masks.labels().tolist()
    [[1, 2, 0]]
    """

    names: tuple[str, ...]
    marked: NDArray[np.bool_]
    images: NDArray[np.float32] | None = None

    def labels(self) -> NDArray[np.uint16]:
        """One number a voxel (*shape): 0, or 1 to K in the order of names; of several, that of the last."""
        found = np.zeros(self.marked.shape[1:], np.uint16)
        for number, mask in enumerate(self.marked, 1):
            found[mask] = number
        return found


@dataclass(frozen=True, eq=False)
class Probabilities:
    """`values` (K,), a probability for each of the classes `names`; they sum to 1 where `exclusive`."""

    names: tuple[str, ...]
    values: NDArray[np.float64]
    exclusive: bool = True

    @property
    def by_name(self) -> dict[str, float]:
        """Class -> probability."""
        return {name: float(value) for name, value in zip(self.names, self.values, strict=True)}

    @property
    def called(self) -> tuple[str, ...]:
        """The likeliest class; where several are possible at once, those above a half."""
        if self.exclusive:
            return (self.names[int(np.argmax(self.values))],)
        return tuple(name for name, value in zip(self.names, self.values, strict=True) if value > 0.5)


Prediction = Masks | Probabilities

"""The whole numbers in which sites add up patients' gradients with noise that they share. No torch.

One patient's clipped gradient is rotated, rounded to steps of the lattice with a bound on its length, and added up;
each site adds discrete Gaussian noise of `deviation` steps. No site's noise is enough; that of `parties` together is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.errors import StudyError
from wardround.protection.compression import Changes, Codec, Restored
from wardround.protection.discrete_gaussian import LARGEST_DEVIATION, rounded_bound, zcdp, zcdp_for
from wardround.protection.rotation import unrotate
from wardround.study.protection import Privacy
from wardround.wire.ring import levels
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Floats, Layout, scale_key

_SMALLEST_DEVIATION = 4


@dataclass(frozen=True)
class Lattice:
    """`step`: what one integer stands for, in the unit of gradients; `bound`: the largest squared norm of a patient."""

    step: float
    deviation: int
    bound: int
    parties: int
    dimension: int

    @property
    def rho(self) -> float:
        """What one sum costs a patient, in zero-concentrated differential privacy."""
        return zcdp(self.bound, self.deviation, self.parties, self.dimension)

    @property
    def noise(self) -> float:
        """The noise of the smallest sum over what a patient can move it by."""
        return self.deviation * math.sqrt(self.parties / self.bound)


def lattice_of(privacy: Privacy, *, bits: int, parties: int, dimension: int, steps: int) -> Lattice:
    """The finest lattice whose noisy sums fit `bits` and whose `steps` fit the budget: a function of public numbers.

    Raises `StudyError` where the ring has too few bits for so many values.
    """
    if privacy.fixed_noise is not None:
        relative = 1.0 / privacy.fixed_noise
    else:
        assert privacy.delta is not None
        relative = math.sqrt(2.0 * zcdp_for(privacy.budget, privacy.delta) / steps)
    deviation = LARGEST_DEVIATION
    while deviation >= _SMALLEST_DEVIATION:
        allowed = parties * (relative * deviation) ** 2
        clip = _longest(allowed, dimension)
        # Twice the expected patients all pulling one way, and eight deviations of noise.
        if clip > 0.0 and 8 * deviation + 2.0 * privacy.patients_per_step * clip <= levels(bits):
            return Lattice(privacy.clip / clip, deviation, math.floor(allowed), parties, dimension)
        deviation //= 2
    raise StudyError(
        f"protection.privacy.noise=distributed: {dimension:,} values with this noise do not fit {bits} bits; raise "
        "protection.ring_bits, lower protection.max_sites, or take a smaller model"
    )


def _longest(allowed: float, dimension: int) -> float:
    """The longest vector, in steps, whose rounding stays within a squared norm; 0 where there is none."""
    low, high = 0.0, math.sqrt(allowed)
    if rounded_bound(0.0, dimension) >= math.floor(allowed):
        return 0.0
    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rounded_bound(middle, dimension) <= math.floor(allowed) else (low, middle)
    return low


@dataclass(frozen=True)
class LatticeCodec(Codec):
    """Passes a site's whole numbers on, and turns their sum into the step that the global model takes.

    `unit` is the change of the model that one step of the lattice stands for.
    """

    unit: float = 1.0

    def compress(
        self, number: int, changes: Changes, memory: Any, limits: Any
    ) -> tuple[Changes, dict[str, npt.NDArray[Any]]]:
        """The integers as they are, within what the ring can say: nothing is kept."""
        return changes, {}

    def next_scales(self, aggregate: Aggregate, *, first: bool) -> tuple[dict[str, float], dict[str, float]]:
        """The same for ever: they bound nothing here, and following a sum near the ring's end they would overflow."""
        return dict(aggregate.scales), {}

    def restore(self, number: int, layout: Layout, aggregate: Aggregate) -> Aggregate:
        """The sum, in the unit of the model and rotated back."""
        bits = {group.name: layout.bits_of(group) for group in layout.groups}

        def back(group: str, info: TensorInfo, sums: Floats) -> Floats:
            # Scales say nothing here: sums go back to whole numbers first.
            factor = self.unit * levels(bits[group]) / aggregate.scales[scale_key(group, info.name)]
            return unrotate(np.asarray(sums) * factor, self.signs(number, group, info.name))

        return Restored(aggregate, layout, self.whole, back)

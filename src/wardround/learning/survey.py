"""A site's training images, as a method may look at them before the first step: the same whenever it looks.

What a method makes of them leaves the site once, in an update. It is a function of the site's data and of the study's
seed, never of what the coordinator sent: who asks a second time gets the same answer, and no second one of other
patients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from wardround.errors import Withheld
from wardround.learning.examples import Examples
from wardround.study.schema import Local
from wardround.tasks.task import Batch, Dataset
from wardround.wire.random import public_generator


@dataclass(frozen=True)
class Survey:
    """Training images of one site, whose batches have `images` (B, C, *shape).

    What is told of them must be of `least` patients, or more: as many as the site's rules say, and never of one alone.
    """

    site: str
    dataset: Dataset
    examples: Examples
    local: Local
    seed: int
    least: int = 2

    @cached_property
    def order(self) -> tuple[tuple[int, ...], ...]:
        """The examples of the study's first round, batch by batch."""
        steps, size = self.examples.steps(self.local), self.local.batch
        found = self.examples.of_round(1, steps * size)
        return tuple(tuple(found[step * size : (step + 1) * size]) for step in range(steps))

    def batches(self) -> Iterator[Tensor]:
        """The images of the first round's batches, changed as that round changes them."""
        for step, part in enumerate(self.order):
            yield self.dataset.batch(part, public_generator(self.seed, self.site, 1, step, "augmentation")).images

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """Whose each training example is."""
        return tuple(int(owner) for owner in self.dataset.owners())

    def check_spread(self, weights: Sequence[float], what: str, remedy: str) -> None:
        """Raise `Withheld` where a mean of the batches with these weights is of too few patients.

        Patients count by Kish's rule: 1 / sum of squares of their shares, which is their number where all weigh alike.
        """
        shares = np.zeros(max(self.owners) + 1)
        for weight, part in zip(weights, self.order, strict=True):
            for example in part:
                shares[self.owners[example]] += weight / len(part)
        found = float(shares.sum() ** 2 / np.square(shares).sum())
        if found < max(2, self.least) - 1e-9:
            raise Withheld(
                f"site {self.site} withholds {what}: it would be of as little as {found:.1f} patients, and the site "
                f"lets out nothing of fewer than {max(2, self.least)}; {remedy}"
            )

    def patients(self) -> tuple[tuple[int, ...], ...]:
        """The examples of each training patient, patients in an order that the study's seed draws."""
        found: dict[int, list[int]] = {}
        for example, owner in enumerate(self.owners):
            found.setdefault(owner, []).append(example)
        names = sorted(found)
        drawn = public_generator(self.seed, self.site, "survey").permutation(len(names))
        return tuple(tuple(found[names[int(number)]]) for number in drawn)

    def images_of(self, examples: Sequence[int]) -> Tensor:
        """The images of some examples of one patient, changed as training changes them."""
        return self.batch_of(examples).images  # type: ignore[no-any-return]

    def batch_of(self, examples: Sequence[int]) -> Batch:
        """The batch of some examples, changed as training changes them and always alike."""
        return self.dataset.batch(examples, public_generator(self.seed, self.site, "survey", *examples))

    def across_patients(self, size: int, most: int) -> tuple[tuple[int, ...], ...]:
        """Up to `most` groups of `size` examples, no two of a group of one patient: the same whenever it is asked.

        Patients who are in a group together are in no group with others; once all have been in one, the next groups
        are of their next examples.
        """
        patients = [
            tuple(own[int(n)] for n in public_generator(self.seed, self.site, "survey", own[0]).permutation(len(own)))
            for own in self.patients()
        ]
        cohorts = [patients[start : start + size] for start in range(0, len(patients) - size + 1, size)]
        turns = max((len(own) for own in patients), default=0)
        found = [
            tuple(own[turn] for own in cohort)
            for turn in range(turns)
            for cohort in cohorts
            if all(len(own) > turn for own in cohort)
        ]
        return tuple(found[:most])

    def cohorts(self, most: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Up to `most` groups of patients that have none in common, as many as have enough patients; none of too few.

        Each is the examples of each of its patients; sizes differ by one at most.
        """
        patients = self.patients()
        count = min(most, len(patients) // max(2, self.least))
        return tuple(patients[number::count] for number in range(count))

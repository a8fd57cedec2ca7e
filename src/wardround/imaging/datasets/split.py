"""Who trains, who validates, who tests: by patient, never by slice."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

from wardround.errors import DataError
from wardround.study.tasks import Split
from wardround.wire.random import public_generator

SplitName: TypeAlias = Literal["train", "validation", "test"]
Role: TypeAlias = Literal["train", "unseen"]


def split_patients(
    count: int, split: Split, seed: int, site: str, role: Role = "train"
) -> dict[SplitName, tuple[int, ...]]:
    """Deal patients 0..count-1 out to train, validation and test.

    The patients are those of the site's folder in the order of their names; the draw depends only on the
    seed, the site's name and the number of patients. With three patients or more, a positive share means at
    least one patient; two patients give one to test first. Every patient of an `unseen` site tests. Raises
    DataError where a training site has too few patients to hold any out.
    """
    if count < 1:
        raise DataError(f"site {site} has no patients")
    if role == "unseen":
        return {"train": (), "validation": (), "test": tuple(range(count))}
    held_out = split.validation > 0 or split.test > 0
    if count == 1 and held_out:
        raise DataError(
            f"site {site} trains but has 1 patient, who cannot both train and be held out; "
            "give it `role: unseen` or leave it out"
        )
    validation, test = _sizes(count, split)
    order = public_generator(seed, "split", site, count).permutation(count)
    parts = np.split(order, [test, test + validation])
    named = {"test": parts[0], "validation": parts[1], "train": parts[2]}
    return {name: tuple(sorted(int(i) for i in named[name])) for name in ("train", "validation", "test")}


def _sizes(count: int, split: Split) -> tuple[int, int]:
    """Return the numbers of validation and test patients; at least one patient is left to train."""
    if count == 2:
        return (0, 1) if split.test > 0 else (int(split.validation > 0), 0)
    validation = max(round(split.validation * count), int(split.validation > 0))
    test = max(round(split.test * count), int(split.test > 0))
    while validation + test >= count:
        if test >= validation:
            test -= 1
        else:
            validation -= 1
    return validation, test

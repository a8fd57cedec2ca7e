"""Who trains, who validates, who tests: by patient, never by slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from wardround.errors import DataError
from wardround.study.tasks import Split
from wardround.wire.canonical import digest
from wardround.wire.random import public_generator

SplitName: TypeAlias = Literal["train", "validation", "test"]
Role: TypeAlias = Literal["train", "evaluate", "unseen"]
Parts: TypeAlias = dict[SplitName, tuple[int, ...]]
#: Who is in which part: of a site, its patients' names in order, the shares, the study's seed and the site's role.
Deal: TypeAlias = Callable[[str, Sequence[str], Split, int, Role], Parts]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")


def by_seed(site: str, names: Sequence[str], split: Split, seed: int, role: Role) -> Parts:
    """A `Deal` that keeps no record: see `split_patients`."""
    return split_patients(len(names), split, seed, site, role)


def deal_in(
    site: str, names: Sequence[str], split: Split, seed: int, role: Role, known: Mapping[str, SplitName]
) -> Parts:
    """A deal in which the patients in `known` keep their parts, and the others join one after another.

    Of whom none is known, they are dealt by `split_patients`. Else new patients come in the order of a hash of seed,
    site and name, each to the part that is furthest below what `split_patients` would give it of as many patients; the
    first of test, validation and train where several are. Where patients are only ever added, every part stays within
    one patient of that: no part is filled above it, test's and validation's never shrink as patients are added, and
    training's shrinks by one patient at most. Raises DataError as `split_patients` does.
    """
    if role == "unseen" or not any(name in known for name in names):
        return split_patients(len(names), split, seed, site, role)
    # The same refusals as ever.
    split_patients(len(names), split, seed, site, role)
    found = {name: known[name] for name in names if name in known}
    sizes = {part: sum(one == part for one in found.values()) for part in SPLIT_NAMES}
    for name in sorted((n for n in names if n not in found), key=lambda n: digest(["split", seed, site, n])):
        validation, test = _sizes(len(found) + 1, split, role)
        wanted = {"test": test, "validation": validation, "train": len(found) + 1 - test - validation}
        part: SplitName = max(("test", "validation", "train"), key=lambda p: wanted[p] - sizes[p])
        found[name] = part
        sizes[part] += 1
    parts = {part: tuple(i for i, name in enumerate(names) if found[name] == part) for part in SPLIT_NAMES}
    if role == "evaluate" and not parts["validation"]:
        raise DataError(f"site {site} evaluates and every patient that it has now tested before; add patients")
    if role == "train" and not parts["train"]:
        raise DataError(f"site {site} trains and every patient that it has now was held out before; add patients")
    return parts


def split_patients(count: int, split: Split, seed: int, site: str, role: Role = "train") -> Parts:
    """Deal patients 0..count-1 out to train, validation and test.

    The patients are those of the site's folder in the order of their names; the draw depends only on the
    seed, the site's name and the number of patients. With three patients or more, a positive share means at
    least one patient; two patients give one to test first. Every patient of an `unseen` site tests; those of an
    `evaluate` site validate and test, in the proportion of the two shares. Raises DataError where a training site has
    too few patients to hold any out, and where an `evaluate` site would have none to validate.
    """
    if count < 1:
        raise DataError(f"site {site} has no patients")
    if role == "unseen":
        return {"train": (), "validation": (), "test": tuple(range(count))}
    if role == "evaluate" and (split.validation <= 0 or (count == 1 and split.test > 0)):
        why = "split.validation is 0" if split.validation <= 0 else "has 1 patient, who cannot both validate and test"
        raise DataError(f"site {site} evaluates and {why}; give it `role: unseen` or leave it out")
    held_out = split.validation > 0 or split.test > 0
    if count == 1 and held_out and role == "train":
        raise DataError(
            f"site {site} trains but has 1 patient, who cannot both train and be held out; "
            "give it `role: unseen` or leave it out"
        )
    validation, test = _sizes(count, split, role)
    order = public_generator(seed, "split", site, count).permutation(count)
    parts = np.split(order, [test, test + validation])
    named = {"test": parts[0], "validation": parts[1], "train": parts[2]}
    return {name: tuple(sorted(int(i) for i in named[name])) for name in ("train", "validation", "test")}


def _sizes(count: int, split: Split, role: Role) -> tuple[int, int]:
    """Return the numbers of validation and test patients; where the site trains, at least one patient is left to."""
    if role == "evaluate":
        if split.test <= 0 or count == 1:
            return count, 0
        test = min(count - 1, max(1, round(count * split.test / (split.validation + split.test))))
        return count - test, test
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

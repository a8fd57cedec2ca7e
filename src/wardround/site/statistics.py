"""What a site says of its images before training, by the rules by which its results leave.

Sums over patients, `least` or more of them, and the same record as for results (`site.measured`) sees to it that no two
answers, of this study and others, differ by fewer: whoever asks again after one patient joined gets no answer. A sum
over the patients that have a value, a structure or a class parts them, so those parts are on record, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.federation.statistics import CLASSES, OTHER, SiteStatistics, Sums
from wardround.site.egress import EgressRules
from wardround.site.measured import MeasuredSets
from wardround.tasks.looks import BINS, Floats, Quantity, Rows, Subject, describes, looks_of, rows_of, whole
from wardround.tasks.task import Dataset, Named, Split

# The part of the record: sets of patients whose images were described, whatever they do in the study.
DESCRIBED = "described"
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# What is of the scanner and its protocol.
_SCANNER = ("matrix", "spacing")
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class OwnStatistics:
    """What a site gives; with differential privacy nothing. `sets` is its record of what it gave before."""

    site: str
    egress: EgressRules
    sets: MeasuredSets
    private: bool = False

    def answer(self, task: Any, subject: Subject, dataset: Dataset) -> SiteStatistics:
        """The sums of all quantities and classes of the study's `task`, and why some stay."""
        if not describes(task, dataset):
            return SiteStatistics(withheld={"all": "the study's task shows no images"})
        split = next((part for part in _SPLITS if dataset.patients(part)), None)
        if split is None:
            return SiteStatistics(withheld={"all": "the site has no patients"})
        names = tuple(dataset.names(split)) if isinstance(dataset, Named) else None
        if (why := self._stay(dataset, split, names)) is not None:
            return SiteStatistics(withheld={"all": why})
        rows = rows_of(subject, looks_of(task, dataset, split))
        return _Answer(self, names, rows).of(subject, split)

    def _stay(self, dataset: Dataset, split: Split, names: Sequence[str] | None) -> str | None:
        """Why nothing leaves; where something does, the patients are on record from now on."""
        if not self.egress.per_site_results:
            return "egress.per_site_results is false"
        if self.private:
            return "with protection.privacy no statistics are given, as they would have no noise"
        if dataset.patients(split) < self.egress.least:
            return f"fewer than {self.egress.least} patients"
        if self.egress.least == 1:
            return None
        return self.sets.join(DESCRIBED, names, dataset.fingerprint(), self.egress.least)

    def parted(self, names: Sequence[str] | None, groups: Sequence[Mask]) -> str | None:
        """Why sums over these groups of the patients, none in two, may not leave; else they are on record."""
        least, sizes = self.egress.least, [int(group.sum()) for group in groups if group.any()]
        if least == 1 or len(sizes) < 2:
            return None
        if min(sizes) < least:
            return f"it would part the patients into groups of which one has fewer than {least}"
        if names is None:
            return "its data name no patients, so groups of them cannot be told from those it gave before"
        members = [[names[int(place)] for place in np.flatnonzero(group)] for group in groups if group.any()]
        return self.sets.join_groups(DESCRIBED, members, least)


@dataclass(frozen=True)
class _Answer:
    """One answer: patients by name, and what they add."""

    own: OwnStatistics
    names: Sequence[str] | None
    rows: Rows

    def of(self, subject: Subject, split: Split) -> SiteStatistics:
        quantities: dict[str, Sums] = {}
        withheld: dict[str, str] = {}
        for name, quantity in subject.quantities.items():
            found = self._sums(name, quantity)
            if isinstance(found, Sums):
                quantities[name] = found
            elif found is not None:
                withheld[name] = found
        classes = self._classes(subject)
        if isinstance(classes, str):
            withheld[CLASSES] = classes
        patients = len(self.rows.values["intensity"])
        return SiteStatistics(
            split=split,
            patients=patients,
            quantities=quantities,
            classes={} if isinstance(classes, str) else classes,
            withheld=withheld,
        )

    def _sums(self, name: str, quantity: Quantity) -> Sums | str | None:
        """The sums of a quantity, or why they stay; `None` where no patient has a value."""
        values = self.rows.values[name]
        there = _whole_rows(values)
        if not there.any():
            return None
        if (why := self._kept(_kind(name))) is not None:
            return why
        for groups in _groups(name, values, there):
            if (why := self.own.parted(self.names, groups)) is not None:
                return why
        given = values[there]
        if name == "intensity":
            channels = np.split(given, quantity.size // BINS, axis=1)
            given = np.concatenate([well_reached(each, self.own.egress.least) for each in channels], axis=1)
        return summed(given, quantity)

    def _classes(self, subject: Subject) -> dict[str, int] | str:
        rows = self.rows.classes
        if rows is None or np.isnan(rows).all():
            return {}
        if (why := self._kept(CLASSES)) is not None:
            return why
        known = _whole_rows(rows)
        if (why := self.own.parted(self.names, [known, ~known])) is not None:
            return why
        shown = np.where(known[:, None], rows, 0.0) > 0.5
        return self._overlapping(subject, known, shown) if subject.several else self._single(subject, shown)

    def _single(self, subject: Subject, shown: Mask) -> dict[str, int] | str:
        """Numbers by class of patients who have one each; those of a handful together, with the next smallest."""
        groups = {name: shown[:, k] for k, name in enumerate(subject.classes)}
        least, few = self.own.egress.least, list[Mask]()
        for name in sorted(groups, key=lambda name: int(groups[name].sum())):
            count, together = int(groups[name].sum()), sum(int(group.sum()) for group in few)
            if 0 < count < least or (0 < together < least and count):
                few.append(groups.pop(name))
        if few:
            groups[OTHER] = np.logical_or.reduce(few)
        present = [group for group in groups.values() if group.any()]
        if least > 1 and len(present) == 1:
            return "it would say of every patient which class they have"
        if (why := self.own.parted(self.names, present)) is not None:
            return why
        return {name: int(group.sum()) for name, group in groups.items()}

    def _overlapping(self, subject: Subject, known: Mask, shown: Mask) -> dict[str, int] | str:
        for column in shown.T:
            if (why := self.own.parted(self.names, [known & column, known & ~column])) is not None:
                return why
        return {name: int(shown[:, k].sum()) for k, name in enumerate(subject.classes)}

    def _kept(self, kind: str) -> str | None:
        """Why a kind of statistics is not among those that the site's file lets out."""
        listed = self.own.egress.metrics
        if kind in _SCANNER and not self.own.egress.scanner_facts:
            return "egress.scanner_facts is false"
        return f"{kind} not in egress.metrics" if listed is not None and kind not in listed else None


def _whole_rows(values: Floats) -> Mask:
    """Of which patients there is a value (n,)."""
    return np.asarray(np.logical_not(np.isnan(values).any(axis=1)))


def _kind(name: str) -> str:
    """What `egress.metrics` calls a quantity: one word for all that is of masks."""
    return name if name in ("intensity", "landmarks", "spectrum", "noise", "matrix", "spacing") else "masks"


def _groups(name: str, values: Floats, there: Mask) -> Iterator[list[Mask]]:
    """The ways in which a sum parts the patients: with and without a value, and with and without a structure."""
    yield [there, ~there]
    if _kind(name) == "masks":
        positive = there & (np.where(there[:, None], values, 0.0) > 0.0).any(axis=1)
        yield [positive, there & ~positive]


def well_reached(shares: Floats, least: int) -> Floats:
    """Histograms (n, bins) without the bins that some and fewer than `least` patients reach; each still sums to 1.

    Such a bin would show what one of them has. Of a patient whose every bin is left out nothing is left.
    """
    reached = (shares > 0).sum(axis=0)
    found = np.where((reached > 0) & (reached < least), 0.0, shares)
    sums = found.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(found, sums, out=np.zeros_like(found), where=sums > 0))


def summed(values: Floats, quantity: Quantity) -> Sums:
    """The sums of patients' values (n, size)."""
    steps = whole(values, quantity)
    squares = np.square(steps).sum(axis=0) if quantity.squares else ()
    return Sums(n=len(steps), total=tuple(map(int, steps.sum(axis=0))), squares=tuple(map(int, squares)))


def kinds_of(subject: Subject) -> Mapping[str, None]:
    """The words that `egress.metrics` may list for statistics of a study, in order."""
    return dict.fromkeys([*map(_kind, subject.quantities), *([CLASSES] if subject.classes else [])])

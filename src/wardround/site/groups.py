"""A site's own results by a column of its table: groups of its test patients, all of a column or none.

A group follows from the whole and the other groups, and a second column parts the first one's groups. So what may leave
is decided for a whole column at a time, and by the same record as for whole test sets (`site.measured`): nothing is
about fewer than `least` patients, whatever is added and subtracted, in this run and those before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.errors import DataError
from wardround.federation.grouped import GroupValue, SiteColumn, SiteGroup, SiteGroups
from wardround.imaging.readers.table import table_rows
from wardround.site.cohorts import kept_back
from wardround.site.egress import EgressRules
from wardround.site.measured import MeasuredSets
from wardround.site.patients import results_of
from wardround.study.groups import OTHER, Column, Groups
from wardround.tasks.estimates import Mean
from wardround.tasks.task import Dataset, MetricSpec, Named

Array = npt.NDArray[Any]
Places = npt.NDArray[np.int64]
# Of each row, what every test patient adds to each metric: row -> metric -> (n, *shape).
Rows = Mapping[str, Mapping[str, Array]]


def labels_of(declared: Groups, names: Sequence[str], site: str) -> dict[str, list[str]]:
    """The group of each of these patients in every declared column.

    A patient of whom the table says nothing, or two things, is in the group `other`. Raises DataError for a table that
    cannot be read, or that knows none of them.
    """
    columns = {name: column.column or name for name, column in declared.columns.items()}
    wanted = set(names)
    cells: dict[str, dict[str, set[str]]] = {name: {} for name in columns}
    where = f"sites.{site}.groups.file"
    for _, row in table_rows(declared.file, (declared.patient, *columns.values()), where):
        if (whose := row[declared.patient]) in wanted:
            for name, column in columns.items():
                cells[name].setdefault(whose, set()).add(row[column])
    if wanted and not any(cells.values()):
        raise DataError(
            f"{where}: its column {declared.patient!r} names none of the site's test patients; patients are called as "
            "their folders are, or as the table of the images calls them"
        )
    return {name: [_label(declared.columns[name], cells[name].get(who, set())) for who in names] for name in columns}


def _label(column: Column, cells: set[str]) -> str:
    labels = {column.label(cell) for cell in cells}
    return labels.pop() if len(labels) == 1 else OTHER


def parted(column: Column, labels: Sequence[str], least: int) -> dict[str, Places]:
    """Places of the patients of each group, in the column's order and `other` last, none of fewer than `least`.

    Those of smaller groups are among the others; where these are still too few, so are those of the next smallest
    group: else they would follow from the rest. Empty where no two groups are left: there is nothing to compare, and
    one group would say of every patient what it is.
    """
    found = {name: np.flatnonzero(np.array(labels) == name) for name in (*column.labels, OTHER)}
    groups = {name: places for name, places in found.items() if len(places) and name != OTHER}
    others = [found[OTHER]]
    for name in sorted(groups, key=lambda name: len(groups[name])):
        if len(groups[name]) < least or 0 < sum(map(len, others)) < least:
            others.append(groups.pop(name))
    rest = np.sort(np.concatenate(others))
    if len(rest):
        groups[OTHER] = rest
    return groups if len(groups) > 1 and min(map(len, groups.values())) >= least else {}


@dataclass(frozen=True)
class OwnGroups:
    """What a site gives by group, by the rules by which its results leave, and with differential privacy nothing.

    `sets` is its record of what it measured. Standard errors of what is no mean come from the secret `root`.
    """

    site: str
    specs: Sequence[MetricSpec]
    egress: EgressRules
    sets: MeasuredSets
    root: bytes
    private: bool = False

    def answer(self, declared: Groups, dataset: Dataset, rows: Rows) -> SiteGroups:
        """Every column that the site's file declares, of the test patients that `rows` are of.

        Raises DataError for a table that cannot be read, and for rows of other patients.
        """
        names = dataset.names("test") if isinstance(dataset, Named) else ()
        if (why := self._stay(rows, named=isinstance(dataset, Named))) is not None:
            return SiteGroups(columns=tuple(SiteColumn(name=name, reason=why) for name in declared.columns))
        if any(len(values) != len(names) for of_row in rows.values() for values in of_row.values()):
            raise DataError(f"site {self.site} measured other patients than it has now; start a run in another folder")
        labels = labels_of(declared, names, self.site)
        columns = declared.columns.items()
        return SiteGroups(columns=tuple(self._column(name, c, names, labels[name], rows) for name, c in columns))

    def _stay(self, rows: Rows, *, named: bool) -> str | None:
        """Why nothing leaves by group."""
        if not self.egress.per_site_results:
            return "egress.per_site_results is false"
        if self.private:
            return "with protection.privacy nothing is given by group, as it would have no noise"
        if not rows:
            return "the site gave no results of its own"
        if not named:
            return "its data name no patients"
        return next((why for values in rows.values() if (why := self.egress.refusal(values)) is not None), None)

    def _column(self, name: str, column: Column, names: Sequence[str], labels: Sequence[str], rows: Rows) -> SiteColumn:
        least = self.egress.least
        groups = parted(column, labels, least)
        if not groups:
            return SiteColumn(name=name, reason=too_few(least))
        if (why := self._refused(names, list(groups.values()))) is not None:
            return SiteColumn(name=name, reason=why)
        given = self._given(names, list(groups.values()), rows)
        if not given:
            return SiteColumn(name=name, reason="no metric has patients enough in each of its groups")
        found = tuple(
            SiteGroup(name=label, rows={row: told for row in rows if (told := self._values(given, rows[row], places))})
            for label, places in groups.items()
        )
        return SiteColumn(name=name, groups=found)

    def _values(self, given: Sequence[MetricSpec], row: Mapping[str, Array], places: Places) -> dict[str, GroupValue]:
        values = {spec.name: row[spec.name][places] for spec in given}
        found = results_of(self.site, given, values, None, least=self.egress.least, root=self.root)
        return {spec.name: _stepped(spec, found[spec.name].mean) for spec in given if found[spec.name].mean.count}

    def _given(self, names: Sequence[str], groups: Sequence[Places], rows: Rows) -> list[MetricSpec]:
        """The metrics that may leave of every group; one that patients can be without may not where single ones show.

        Who has a value must not depend on the model: sets that differ from row to row would be as many sets.
        """
        least = self.egress.least
        if least == 1:
            return list(self.specs)
        stays: set[str] = set()
        for values in rows.values():
            for part in (np.concatenate(groups), *groups):
                of_part = {name: found[part] for name, found in values.items()}
                stays |= kept_back(self.specs, of_part, least, bins=False).keys()
        return [spec for spec in self.specs if spec.name not in stays and self._fits(spec, names, groups, rows)]

    def _fits(self, spec: MetricSpec, names: Sequence[str], groups: Sequence[Places], rows: Rows) -> bool:
        if not spec.counts_apart:
            return True
        masks = [spec.kind.counted(values[spec.name]) for values in rows.values()]
        having = [mask for mask in masks if mask.any()]
        if not having or any((mask != having[0]).any() for mask in having):
            return False
        parts = [places[having[0][places]] for places in groups]
        return all(map(len, parts)) and self._refused(names, parts) is None

    def _refused(self, names: Sequence[str], groups: Sequence[Places]) -> str | None:
        """Why groups of these patients may not leave; where they may, they are on record from now on."""
        if self.egress.least == 1:
            return None
        return self.sets.join_groups("test", [[names[i] for i in places] for places in groups], self.egress.least)


def too_few(least: int) -> str:
    """Why a column has no groups."""
    return "its test patients make no two groups" + (f" of {least} or more" if least > 1 else "")


def _stepped(spec: MetricSpec, mean: Mean) -> GroupValue:
    """A result in whole steps of the metric, as a site's other results leave."""

    def stepped(value: float) -> float:
        return round(round(value / spec.resolution) * spec.resolution, 12)

    return GroupValue(
        n=mean.count,
        value=stepped(mean.value),
        se=None if mean.error is None else stepped(mean.error),
        absent=mean.absent,
    )

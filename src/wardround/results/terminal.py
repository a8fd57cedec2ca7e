"""A run's results as a terminal shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table

from wardround.results.gate import entry_words
from wardround.results.metrics import MetricInfo
from wardround.results.run import FAILED, WITHHELD, arms_in, leading, site_title, trained
from wardround.results.schema import AGGREGATES, Estimate, Measured

# A label is broken over lines where it is longer; a site's name has this much room, and more where there is more.
_LABEL, _NAME = 12, 12
# What stands between two columns, and at both ends of a row.
_BETWEEN, _ENDS = 3, 1


def tables_of(measured: Measured, width: int) -> list[Table]:
    """The first metric of every arm, a row for each site (there may be many sites, but few arms); none without any.

    Where no baseline has a value of it, the first metric that one has follows. No table is wider than `width` columns:
    long names and labels take several lines, and arms that do not fit beside the others get a table of their own. No
    number is cut. Of each column by whose values sites give results, a table of the first metric comes last.
    """
    metrics = leading(measured)
    whole = [table for metric in metrics for table in _tables(measured, metric, width)]
    columns = dict.fromkeys(groups.column for groups in measured.groups)
    return whole + [t for name in columns for metric in metrics[:1] for t in _grouped(measured, name, metric, width)]


def _tables(measured: Measured, metric: MetricInfo, width: int) -> list[Table]:
    found = dict.fromkeys(site for arm in measured.arms for site in measured.metrics[arm])
    # In the study's order, then the aggregates.
    sites = sorted(found, key=lambda site: site in AGGREGATES)
    columns = [
        _Column.of(arm.label, metric, [measured.estimate(arm.key, site, metric.name) for site in sites])
        for arm in arms_in(measured, metric)
    ]
    return _drawn(_title(metric), [site_title(site, trained=trained(measured)) for site in sites], columns, width)


def _grouped(measured: Measured, name: str, metric: MetricInfo, width: int) -> list[Table]:
    """The same by the groups of a column, a row for each group of a site that has a number."""
    groups = [group for group in measured.groups if group.column == name]
    sites = [*dict.fromkeys(site for group in groups for _, site, _, _ in group.estimates() if site != "mean"), "mean"]
    arms = arms_in(measured, metric)
    rows = [
        (
            f"{site_title(site, trained=trained(measured))}, {group.group}",
            [group.estimate(arm.key, site, metric.name) for arm in arms],
        )
        for site in sites
        for group in groups
    ]
    rows = [row for row in rows if any(row[1])]
    if not rows:
        return []
    cells = zip(*(found for _, found in rows), strict=True)
    columns = [_Column.of(arm.label, metric, found) for arm, found in zip(arms, cells, strict=True) if any(found)]
    return _drawn(f"{_title(metric)}, by {name}", [title for title, _ in rows], columns, width)


def _title(metric: MetricInfo) -> str:
    return f"{metric.label}{f' in {metric.unit}' if metric.unit else ''} on test patients, {metric.direction}"


@dataclass(frozen=True)
class _Column:
    """An arm's label, and what stands below it."""

    label: str
    values: tuple[str, ...]

    @classmethod
    def of(cls, label: str, metric: MetricInfo, found: Iterable[Estimate | None]) -> _Column:
        """Numbers of a metric, a dash where there is none."""
        return cls(label, tuple(metric.show(one.value) if one else "-" for one in found))

    @property
    def wide(self) -> int:
        """Its width with the label on one line."""
        return max(self.narrow, cell_len(self.label))

    @property
    def narrow(self) -> int:
        """Its least width: numbers are whole, and so are the words of the label unless they are very long."""
        words = max((cell_len(word) for word in self.label.split()), default=0)
        return max(min(words, _LABEL), *map(cell_len, self.values))


def _beside(columns: Sequence[_Column], longest: int, width: int) -> list[list[_Column]]:
    """The columns of each table, as many as fit beside each other and the names of the sites."""
    tables: list[list[_Column]] = []
    for column in columns:
        if tables and _total(min(longest, _NAME), [c.narrow for c in (*tables[-1], column)]) <= width:
            tables[-1].append(column)
        else:
            tables.append([column])
    return tables


def _drawn(title: str, rows: Sequence[str], columns: Sequence[_Column], width: int) -> list[Table]:
    longest = max(map(cell_len, rows))
    return [_table(title, rows, beside, longest, width) for beside in _beside(columns, longest, width)]


def _table(title: str, rows: Sequence[str], columns: Sequence[_Column], longest: int, width: int) -> Table:
    widths = [column.wide for column in columns]
    if _total(longest, widths) > width:
        widths = [column.narrow for column in columns]
    table = Table(title=title)
    table.add_column("", width=min(longest, width - _total(0, widths)), overflow="fold")
    for column, each in zip(columns, widths, strict=True):
        table.add_column(column.label, justify="right", width=each, overflow="fold")
    for row, *values in zip(rows, *(column.values for column in columns), strict=True):
        table.add_row(row, *values)
    return table


def _total(name: int, widths: Sequence[int]) -> int:
    """The width of a table with such columns behind one for names."""
    return _ENDS + name + sum(widths) + _BETWEEN * (1 + len(widths))


def lacking_in(measured: Measured) -> list[str]:
    """A line for every site that withheld its numbers, or could not be measured, with the reason."""
    return [
        f"{site}: {text} ({reason})"
        for text, reasons in ((WITHHELD, measured.withheld), (FAILED, measured.failed))
        for site, reason in reasons.items()
    ]


def gate_lines(measured: Measured) -> list[str]:
    """What the gate says: whether the new model takes the release's place, and a line for each site and metric."""
    gate = measured.gate
    if gate is None:
        return []
    metrics = {metric.name: metric for metric in measured.metric_specs}
    head = (
        "Promoted: the new model takes the place of the release" if gate.promoted else "Not promoted: the release stays"
    )
    return [f"{head}:"] + [
        f"  {site}, {metrics[name].label}: {entry_words(metrics[name], entry)}"
        for site, of_site in gate.sites.items()
        for name, entry in of_site.items()
    ]

"""A run's results as a terminal shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table

from wardround.results.metrics import MetricInfo
from wardround.results.run import FAILED, WITHHELD, arms_in, leading, site_title
from wardround.results.schema import AGGREGATES, Measured

# A label is broken over lines where it is longer; a site's name has this much room, and more where there is more.
_LABEL, _NAME = 12, 12
# What stands between two columns, and at both ends of a row.
_BETWEEN, _ENDS = 3, 1


def tables_of(measured: Measured, width: int) -> list[Table]:
    """The first metric of every arm, a row for each site (there may be many sites, but few arms); none without any.

    Where no baseline has a value of it, the first metric that one has follows. No table is wider than `width` columns:
    long names and labels take several lines, and arms that do not fit beside the others get a table of their own. No
    number is cut.
    """
    return [table for metric in leading(measured) for table in _tables(measured, metric, width)]


def _tables(measured: Measured, metric: MetricInfo, width: int) -> list[Table]:
    found = dict.fromkeys(site for arm in measured.arms for site in measured.metrics[arm])
    # In the study's order, then the aggregates.
    sites = sorted(found, key=lambda site: site in AGGREGATES)
    columns = []
    for arm in arms_in(measured, metric):
        cells = (measured.estimate(arm.key, site, metric.name) for site in sites)
        columns.append(_Column(arm.label, tuple(metric.show(cell.value) if cell else "-" for cell in cells)))
    unit = f" in {metric.unit}" if metric.unit else ""
    title = f"{metric.label}{unit} on test patients, {metric.direction}"
    titles = [site_title(site) for site in sites]
    longest = max(map(cell_len, titles))
    return [_drawn(title, titles, beside, longest, width) for beside in _beside(columns, longest, width)]


@dataclass(frozen=True)
class _Column:
    """An arm's label, and what stands below it."""

    label: str
    values: tuple[str, ...]

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


def _drawn(title: str, sites: Sequence[str], columns: Sequence[_Column], longest: int, width: int) -> Table:
    widths = [column.wide for column in columns]
    if _total(longest, widths) > width:
        widths = [column.narrow for column in columns]
    table = Table(title=title)
    table.add_column("", width=min(longest, width - _total(0, widths)), overflow="fold")
    for column, each in zip(columns, widths, strict=True):
        table.add_column(column.label, justify="right", width=each, overflow="fold")
    for site, *values in zip(sites, *(column.values for column in columns), strict=True):
        table.add_row(site, *values)
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

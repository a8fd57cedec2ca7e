"""A run's results as a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.table import Table

from wardround.report.metrics import metrics_in
from wardround.report.results import arm_of, site_title
from wardround.report.unmeasured import FAILED, WITHHELD

# A label is broken over lines where it is longer; a site's name has this much room, and more where there is more.
_LABEL, _NAME = 12, 12
# What stands between two columns, and at both ends of a row.
_BETWEEN, _ENDS = 3, 1


def tables_of(result: Mapping[str, Any], width: int) -> list[Table]:
    """The first metric of every arm, a row for each site (there may be many sites, but few arms); none without any.

    `result` is a result.json, or what measuring it again gave. No table is wider than `width` columns: long names and
    labels take several lines, and arms that do not fit beside the others get a table of their own. No number is cut.
    """
    rows = {arm: row for arm, row in result["metrics"].items() if arm != "baseline"}
    names = {name for row in rows.values() for cell in row.values() if cell for name in cell}
    if not names:
        return []
    metric = next(metric for metric in metrics_in(result) if metric.name in names)
    sites = _sites_of(rows)
    columns = []
    for arm in sorted(rows, key=_place):
        cells = (rows[arm].get(site) for site in sites)
        values = tuple(metric.show(cell[metric.name]["value"]) if cell else "-" for cell in cells)
        columns.append(_Column(arm_of(arm).label, values))
    better = "higher" if metric.larger_is_better else "lower"
    unit = f" in {metric.unit}" if metric.unit else ""
    title = f"{metric.label}{unit} on test patients, {better} is better"
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


def lacking_in(result: Mapping[str, Any]) -> list[str]:
    """A line for every site that withheld its numbers, or could not be measured, with the reason."""
    return [
        f"{site}: {text} ({reason})"
        for key, text in (("withheld", WITHHELD), ("failed", FAILED))
        for site, reason in (result.get(key) or {}).items()
    ]


def numbers_of(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of nested tables by its dotted key."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found.update(numbers_of(value, f"{prefix}{key}."))
        elif value is not None:
            found[prefix + key] = value
    return found


def _place(arm: str) -> int:
    """Baselines first, then from alone to pooled, as in the report."""
    order = ("local", "federated", "pooled")
    return order.index(arm) if arm in order else -1


def _sites_of(rows: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Sites in the order of the study, then the aggregates."""
    last = ("mean", "unseen")
    sites = dict.fromkeys(site for row in rows.values() for site in row)
    return [*(site for site in sites if site not in last), *(site for site in last if site in sites)]

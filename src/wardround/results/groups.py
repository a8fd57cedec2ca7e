"""Results by a column that sites declare, as rows of a page and of a model card."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from wardround.results import figures
from wardround.results.metrics import MetricInfo
from wardround.results.run import Run, ShownArm, site_title
from wardround.results.schema import Estimate, GroupTables
from wardround.results.views import Cell, best_shown, cell_of


@dataclass(frozen=True)
class GroupRow:
    """A group at a site, or over sites: a cell for each arm, and the shared model's lane.

    `span` is the number of rows of the site, 0 but in its first one.
    """

    site: str
    span: int
    aggregate: bool
    group: str
    n: str
    cells: tuple[Cell, ...]
    lane: Markup


@dataclass(frozen=True)
class GroupTable:
    """A column by one metric, and the arm whose lanes are drawn."""

    metric: MetricInfo
    arms: tuple[ShownArm, ...]
    drawn: ShownArm
    rows: tuple[GroupRow, ...]
    axis: Markup


@dataclass(frozen=True)
class GroupedColumn:
    """A column by every metric that it has."""

    name: str
    tables: tuple[GroupTable, ...]


def grouped_columns(run: Run) -> tuple[GroupedColumn, ...]:
    """The columns of a run's result that have a number, in its order."""
    names = dict.fromkeys(tables.column for tables in run.result.groups)
    found = []
    for name in names:
        groups = [tables for tables in run.result.groups if tables.column == name]
        tables = [table for metric in run.result.measured if (table := _table(run, groups, metric)) is not None]
        if tables:
            found.append(GroupedColumn(name, tuple(tables)))
    return tuple(found)


def _table(run: Run, groups: list[GroupTables], metric: MetricInfo) -> GroupTable | None:
    def estimate(group: GroupTables, arm: ShownArm, site: str) -> Estimate | None:
        return group.estimate(arm.key, site, metric.name)

    keys = (*run.sites, "mean")
    arms = [arm for arm in run.arms_in(metric) if any(estimate(g, arm, key) for g in groups for key in keys)]
    if not arms:
        return None
    together = next((arm for arm in arms if arm.key == "federated"), arms[0])
    wholes = {key: run.result.estimate(together.key, key, metric.name) for key in keys}
    drawn = [one for group in groups for key in keys if (one := estimate(group, together, key)) is not None]
    shown = [key for key in keys if any(estimate(group, together, key) for group in groups)]
    ends = [end for one in drawn for end in (one.value, *(one.interval or ()))]
    scale = figures.scale_for([*ends, *(whole.value for key in shown if (whole := wholes[key]) is not None)])
    rows: list[GroupRow] = []
    for key in keys:
        present = [group for group in groups if any(estimate(group, arm, key) for arm in arms)]
        whole = wholes[key]
        for group in present:
            found = {arm: estimate(group, arm, key) for arm in arms}
            shared, best = found[together], best_shown(metric, found)
            most = max(one.n for one in found.values() if one is not None)
            rows.append(
                GroupRow(
                    site=site_title(key, trained=run.trained),
                    span=len(present) if group is present[0] else 0,
                    aggregate=key == "mean",
                    group=group.group,
                    n=str(most),
                    cells=tuple(Cell("–") if o is None else cell_of(metric, a, o, best) for a, o in found.items()),
                    lane=figures.lane(
                        scale,
                        together.style,
                        None if shared is None else shared.value,
                        None if shared is None else shared.interval,
                        None if whole is None else whole.value,
                    ),
                )
            )
    return GroupTable(metric, tuple(arms), together, tuple(rows), figures.axis(scale))

"""What unlike sites cost: what each site's own model gives at each other site, from a run with `--compare local`."""

from __future__ import annotations

from pydantic import Field

from wardround.errors import DataError
from wardround.results.heat import EMPTY, HeatCell, HeatTable
from wardround.results.metrics import MetricInfo
from wardround.results.schema import Estimate, Measured, Result
from wardround.study.base import Config

# The row of the shared model: no site is called so.
TOGETHER = "federated"


class Crossing(Config):
    """Every site's own model at every site, by one metric: `values[trained at][tested at]`; the last row is the shared
    model's. `lost` is how much worse that is than the tested site's own model, below 0 where it is better."""

    metric: MetricInfo
    values: dict[str, dict[str, Estimate]]
    lost: dict[str, dict[str, float]] = Field(description="in the metric's unit")

    @property
    def caption(self) -> str:
        """What the table shows."""
        return (
            f"{self.metric.heading}, {self.metric.direction}: rows are the site whose patients trained the model, "
            "columns those who tested it; below, how far that is from the column's own model"
        )

    @property
    def mean_lost(self) -> float | None:
        """The mean over all pairs of two sites of what a site loses with the other's model; `None` without a pair."""
        pairs = [
            lost for row, columns in self.lost.items() for at, lost in columns.items() if row not in (at, TOGETHER)
        ]
        return sum(pairs) / len(pairs) if pairs else None


def crossings(measured: Measured) -> tuple[Crossing, ...]:
    """One for each metric that any of these models has at two sites or more; none where no model left its site."""
    found = []
    for metric in measured.measured:
        rows = {trained: _row(measured, trained, metric.name) for trained in measured.elsewhere}
        rows[TOGETHER] = {
            site: one
            for site in dict.fromkeys(site for row in rows.values() for site in row)
            if (one := measured.estimate(TOGETHER, site, metric.name)) is not None
        }
        if any(len(row) > 1 for trained, row in rows.items() if trained != TOGETHER):
            own = {site: row[site].value for site, row in rows.items() if site in row}
            lost = {
                trained: {
                    site: round(-metric.gain(one.value, own[site]), 6) for site, one in row.items() if site in own
                }
                for trained, row in rows.items()
            }
            found.append(Crossing(metric=metric, values=rows, lost=lost))
    return tuple(found)


def _row(measured: Measured, trained: str, metric: str) -> dict[str, Estimate]:
    table = measured.elsewhere[trained]
    return {site: one for site, row in table.items() if row is not None and (one := row.get(metric)) is not None}


def costs_of(result: Result) -> tuple[Crossing, ...]:
    """The same of a finished run; raises `DataError` where it has none."""
    if found := crossings(result):
        return found
    if result.privacy is not None and result.privacy.secure:
        raise DataError(
            "under protection.secure a site's own model never leaves it, so it is tested at no other site; compare in "
            "a run without it"
        )
    raise DataError("the run trained no site alone, or no site let its results out: run with --compare local")


def matrix_table(crossing: Crossing) -> HeatTable:
    """The table, darker where more is lost."""
    metric = crossing.metric
    columns = tuple(dict.fromkeys(site for row in crossing.values.values() for site in row))
    largest = max((lost for row in crossing.lost.values() for lost in row.values()), default=0.0)

    def cell(trained: str, site: str) -> HeatCell:
        one = crossing.values[trained].get(site)
        if one is None:
            return EMPTY
        if trained == site:
            return HeatCell(metric.show(one.value), 0.0, "own", own=True)
        lost = crossing.lost[trained].get(site)
        share = 0.0 if lost is None or largest <= 0 else max(lost, 0.0) / largest
        return HeatCell(metric.show(one.value), share, "" if lost is None else metric.difference(metric.printed(-lost)))

    rows = tuple(
        ("together" if name == TOGETHER else name, tuple(cell(name, site) for site in columns))
        for name in crossing.values
    )
    return HeatTable("Trained at", columns, rows)

"""A run's results as a terminal shows them."""

from __future__ import annotations

from rich.table import Table

from wardround.results.run import FAILED, WITHHELD, arms_of
from wardround.results.schema import AGGREGATES, Measured


def table_of(measured: Measured) -> Table | None:
    """The first metric of every arm, a row for each site (there may be many sites, but few arms); None without any."""
    if not measured.measured:
        return None
    metric = measured.measured[0]
    unit = f" in {metric.unit}" if metric.unit else ""
    table = Table(title=f"{metric.label}{unit} on test patients, {metric.direction}")
    table.add_column("")
    arms = arms_of(measured)
    for arm in arms:
        table.add_column(arm.label, justify="right")
    sites = dict.fromkeys(site for arm in measured.arms for site in measured.metrics[arm])
    # In the study's order, then the aggregates.
    for site in sorted(sites, key=lambda site: site in AGGREGATES):
        found = (measured.estimate(arm.key, site, metric.name) for arm in arms)
        table.add_row(site, *(metric.show(each.value) if each else "-" for each in found))
    return table


def lacking_in(measured: Measured) -> list[str]:
    """A line for every site that withheld its numbers, or could not be measured, with the reason."""
    return [
        f"{site}: {text} ({reason})"
        for text, reasons in ((WITHHELD, measured.withheld), (FAILED, measured.failed))
        for site, reason in reasons.items()
    ]

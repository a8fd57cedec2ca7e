"""A run's results as a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from wardround.report.metrics import metrics_in
from wardround.report.results import arm_of
from wardround.report.unmeasured import FAILED, WITHHELD


def table_of(result: Mapping[str, Any]) -> Table | None:
    """The first metric of every arm, a row for each site (there may be many sites, but few arms); None without any.

    `result` is a result.json, or what measuring it again gave.
    """
    rows = {arm: row for arm, row in result["metrics"].items() if arm != "baseline"}
    names = {name for row in rows.values() for cell in row.values() if cell for name in cell}
    if not names:
        return None
    metric = next(metric for metric in metrics_in(result) if metric.name in names)
    better = "higher" if metric.larger_is_better else "lower"
    unit = f" in {metric.unit}" if metric.unit else ""
    table = Table(title=f"{metric.label}{unit} on test patients, {better} is better")
    table.add_column("")
    arms = sorted(rows, key=_place)
    for arm in arms:
        table.add_column(arm_of(arm).label, justify="right")
    for site in _sites_of(rows):
        cells = (rows[arm].get(site) for arm in arms)
        table.add_row(site, *(metric.show(cell[metric.name]["value"]) if cell else "-" for cell in cells))
    return table


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

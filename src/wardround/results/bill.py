"""The bill of a run as people read it: what its messages held, by kind, from the sites and to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from wardround.results.run import trained
from wardround.results.schema import Bill, Result, Sizes
from wardround.results.units import human_bytes

LABELS = {
    "base": "Frozen base",
    "model": "Model",
    "adapters": "Adapters",
    "metrics": "Metrics",
    "side_channels": "Side channels",
    "other": "Headers and keys",
}
_TOTAL = "Total"
# Arms of one kind are one column.
_GROUPS = {"pooled": "Pooled", "local": "Alone, all sites", "without": "Without one site, all"}


@dataclass(frozen=True)
class BillTable:
    """Rows of kinds; a column for the federation's rounds, its tests, every other sort of arm, and the study."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def bill_of(result: Result) -> BillTable | None:
    """The bill of a run, each cell `from the sites / to the sites`; None where the run has none."""
    columns = {name: bill for name, bill in _columns(result) if bill.up.total or bill.down.total}
    if not columns:
        return None
    rows = [
        (label, tuple(f"{human_bytes(up)} / {human_bytes(down)}" for up, down in cells))
        for label, cells in _rows(result, list(columns.values()))
    ]
    return BillTable(tuple(columns), tuple(rows))


def bill_on_terminal(result: Result) -> Table | None:
    """The bill of the federation in less than 80 columns; None where the run has none."""
    federated = result.traffic.arms.get("federated")
    if federated is None:
        return None
    # A run that trained nothing has no rounds to show.
    bills = {"rounds": federated.rounds, "tests": federated.tests} if trained(result) else {"tests": federated.tests}
    table = Table(title=f"Bytes of the {'federation' if trained(result) else 'given model'}, all sites")
    table.add_column("")
    for name in bills:
        table.add_column(f"{name}, up", justify="right")
        table.add_column(f"{name}, down", justify="right")
    for label, cells in _rows(result, list(bills.values())):
        table.add_row(label, *(human_bytes(count) for pair in cells for count in pair))
    return table


def _columns(result: Result) -> Iterator[tuple[str, Bill]]:
    arms = dict(result.traffic.arms)
    if (federated := arms.pop("federated", None)) is not None:
        label = "Together" if trained(result) else "Given model"
        yield f"{label}, rounds", federated.rounds
        yield f"{label}, tests", federated.tests
    for group, label in _GROUPS.items():
        bills = [bill for name, arm in arms.items() if name.partition("/")[0] == group for _, bill in arm]
        yield label, _sum(bills)
    yield "The study as a whole", result.traffic.study


def _sum(bills: list[Bill]) -> Bill:
    def added(sizes: list[Sizes]) -> Sizes:
        return Sizes(**{kind: sum(getattr(each, kind) for each in sizes) for kind in LABELS})

    return Bill(up=added([bill.up for bill in bills]), down=added([bill.down for bill in bills]))


def _rows(result: Result, bills: list[Bill]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Every kind of which anything was sent, the base where there is one, and the total."""
    for kind, label in LABELS.items():
        cells = [(getattr(bill.up, kind), getattr(bill.down, kind)) for bill in bills]
        if any(map(any, cells)) or (kind == "base" and result.frozen_sha256 is not None):
            yield label, cells
    yield _TOTAL, [(bill.up.total, bill.down.total) for bill in bills]

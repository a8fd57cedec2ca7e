"""The numbers of a result as plain tables: one row for each, for spreadsheets and for comparing two measurements."""

from __future__ import annotations

import csv
import io

from wardround.results.schema import Estimate, Measured

_COLUMNS = ("value", "se", "ci_low", "ci_high", "n", "absent")


def csv_of(measured: Measured) -> str:
    """A tidy table as CSV: a row for each arm, site (or `mean`, `unseen`) and metric; what there is not is empty.

    Where a site's own model was tested at other sites, it stands as the arm `local/SITE`. Where there are results by
    group, rows of their own follow, with `column` and `group` at their end.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    grouped = bool(measured.groups)
    writer.writerow(("arm", "site", "metric", *_COLUMNS, *(("column", "group") if grouped else ())))
    for *where, found in measured.estimates():
        writer.writerow((*where, *_numbers(found), *(("", "") if grouped else ())))
    for trained, *where, found in measured.crossed():
        if trained != where[0]:
            writer.writerow((f"local/{trained}", *where, *_numbers(found), *(("", "") if grouped else ())))
    for tables in measured.groups:
        for *where, found in tables.estimates():
            writer.writerow((*where, *_numbers(found), tables.column, tables.group))
    return file.getvalue()


def _numbers(found: Estimate) -> list[float | int | None]:
    return [getattr(found, column) for column in _COLUMNS]


def numbers_of(measured: Measured) -> dict[str, float]:
    """Every number of the metrics by its dotted key: `federated.mean.psnr.value`, `sex.female.federated.A.dice.n`."""
    groups = ((f"{t.column}.{t.group}.", t.estimates()) for t in measured.groups)
    return {
        f"{before}{arm}.{site}.{metric}.{column}": value
        for before, estimates in (("", measured.estimates()), ("elsewhere.", measured.crossed()), *groups)
        for arm, site, metric, found in estimates
        for column, value in found.model_dump(exclude_none=True).items()
    }

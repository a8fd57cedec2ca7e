"""The numbers of a result as plain tables: one row for each, for spreadsheets and for comparing two measurements."""

from __future__ import annotations

import csv
import io

from wardround.results.schema import Measured

_COLUMNS = ("value", "se", "ci_low", "ci_high", "n", "absent")


def csv_of(measured: Measured) -> str:
    """A tidy table as CSV: a row for each arm, site (or `mean`, `unseen`) and metric; what there is not is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("arm", "site", "metric", *_COLUMNS))
    for arm, site, metric, found in measured.estimates():
        writer.writerow((arm, site, metric, *(getattr(found, column) for column in _COLUMNS)))
    return file.getvalue()


def numbers_of(measured: Measured) -> dict[str, float]:
    """Every number of the metrics by its dotted key: `federated.mean.psnr.value`."""
    return {
        f"{arm}.{site}.{metric}.{column}": value
        for arm, site, metric, found in measured.estimates()
        for column, value in found.model_dump(exclude_none=True).items()
    }

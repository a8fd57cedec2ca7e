"""What a site measured of each test patient: it stays in the site's folders, and only means of it leave.

A row is one way of getting images at the site, a model or a baseline. The site keeps every row's values, patient by
patient, so that it can give the standard error of a paired difference. There is one row that others are compared with:
with all pairs a coordinator could choose would come every second moment of the rows, which no comparison needs.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wardround.errors import DataError, JournalError, Rejected, Withheld
from wardround.federation.egress import EgressRules
from wardround.federation.measured import MeasuredSets
from wardround.federation.sums import Result, evaluation_entries
from wardround.federation.vault import Vault
from wardround.tasks.estimates import LEAST_PATIENTS, mean_of, two_digits
from wardround.tasks.task import Dataset, Named, Split
from wardround.wire.files import write_text
from wardround.wire.message import Header

if TYPE_CHECKING:
    from wardround.federation.training import Learner

Array = npt.NDArray[Any]
# The row that every other row of a study is compared with.
REFERENCE = "federated"
# The evaluator of what learns nothing, and in a request to it the key of its name.
BASELINE = "baseline"
COLUMNS = ("patient", "folder", "row", "metric", "value")


class PatientRows:
    """The rows of one site in one run, in `folder` (sealed with a `vault`), or in memory without a folder.

    With `table`, a path in the site's own folder, all rows are written there too, readable: for the eyes of a person
    who has the patients.
    """

    def __init__(self, folder: Path | None = None, vault: Vault | None = None, table: Path | None = None) -> None:
        self._folder, self._vault, self._table = folder, vault, table
        self._rows: dict[str, dict[str, Array]] = {}

    def keep(self, row: str, values: Mapping[str, Array], names: Sequence[str]) -> None:
        """Keep a row's values, metric -> one for each patient, and write the table anew; `names` go there alone.

        What was kept of the row before is replaced: measured again, it is the same.
        """
        self._rows[row] = dict(values)
        if self._folder is not None:
            plain = json.dumps({name: [float(v) for v in per_patient] for name, per_patient in values.items()})
            # On disk before the answer: one that outlived its row would leave the others nothing to compare with.
            write_text(self._path(row), plain if self._vault is None else self._vault.seal(plain, row), durable=True)
        if self._table is not None:
            self._write_table(self._table, names)

    def of(self, row: str) -> dict[str, Array] | None:
        """A row's values, if the site measured it in this run."""
        if row not in self._rows and self._folder is not None and self._path(row).exists():
            text = self._path(row).read_text(encoding="utf-8")
            plain = json.loads(text if self._vault is None else self._vault.open(text, row))
            self._rows[row] = {name: np.array(per_patient) for name, per_patient in plain.items()}
        return self._rows.get(row)

    def _path(self, row: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{row.replace('/', '-')}.json"

    def _write_table(self, path: Path, names: Sequence[str]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row, values in self._all().items():
            for metric, per_patient in values.items():
                for number, value in enumerate(per_patient):
                    folder = names[number] if number < len(names) else ""
                    writer.writerow((number, folder, row, metric, repr(float(value))))
        write_text(path, text.getvalue())

    def _all(self) -> dict[str, dict[str, Array]]:
        """Every row by its own name; sites of other arms, perhaps in other processes, wrote some of them."""
        if self._folder is None:
            return self._rows
        known = json.loads(self._index.read_text(encoding="utf-8")) if self._index.exists() else []
        names = list(dict.fromkeys([*known, *self._rows]))
        if names != known:
            write_text(self._index, json.dumps(names))
        return {row: values for row in names if (values := self.of(row)) is not None}

    @property
    def _index(self) -> Path:
        assert self._folder is not None
        return self._folder / "index.json"


class OwnResults:
    """What a site gives of its own test patients: rows of the study, by its own rules.

    `sets` is its record of the patients that it measured; nothing is recorded without.
    """

    def __init__(
        self,
        site: str,
        arm: str,
        baselines: frozenset[str],
        egress: EgressRules,
        rows: PatientRows,
        sets: MeasuredSets | None,
    ) -> None:
        self._site, self._arm, self._baselines = site, arm, baselines
        self._egress, self._rows, self._sets = egress, rows, sets

    def row(self, header: Header) -> str:
        """The row that a request asks for; raises `Rejected` for one that the study does not have."""
        if header.meta.get("evaluator") != BASELINE:
            return self._arm
        name = header.meta.get(BASELINE)
        if name not in self._baselines:
            raise Rejected(f"site {self._site} is asked for a baseline that the study does not have")
        return str(name)

    def entries(self, header: Header, values: Mapping[str, Array], learner: Learner) -> dict[str, Any]:
        """The entries of a row, and its patients' values kept here.

        Raises `Withheld` where the site's rules keep them, `Rejected` for another comparison than with the reference
        row, and `JournalError` where that was not measured yet.
        """
        row, against, dataset = self.row(header), header.meta.get("against"), learner.dataset
        if against not in (None, REFERENCE):
            raise Rejected(f"site {self._site} compares rows with {REFERENCE} alone")
        if (why := self.withheld("test", values, dataset)) is not None:
            raise Withheld(f"site {self._site} withholds its own results: {why}")
        reference = self._rows.of(REFERENCE) if against else None
        if against and reference is None:
            raise JournalError(f"site {self._site} has no row {REFERENCE} to compare with; measure that one first")
        self._rows.keep(row, values, dataset.names("test") if isinstance(dataset, Named) else ())
        results = results_of(self._site, values, reference, least=self._egress.least)
        return evaluation_entries(learner.task.metrics, results)

    def withheld(self, split: Split, values: Mapping[str, Array], dataset: Dataset) -> str | None:
        """Why what is summed over these patients may not leave; where it may, the set is on record from now on."""
        egress = self._egress
        if (why := egress.refusal(values)) is not None or egress.least == 1 or self._sets is None:
            return why
        names = dataset.names(split) if isinstance(dataset, Named) else None
        return self._sets.join(split, names, dataset.fingerprint(), egress.least)


def results_of(
    site: str,
    values: Mapping[str, Array],
    reference: Mapping[str, Array] | None,
    *,
    least: int,
) -> dict[str, Result]:
    """What may leave of a row: n, value and standard errors; the paired ones where there is a `reference`.

    Where fewer than `LEAST_PATIENTS` patients make an interval there is no standard error, unless the site's rules let
    single patients out anyway (`least` of 1). Otherwise it has two digits. Raises `DataError` for a reference of other
    patients.
    """
    found: dict[str, Result] = {}
    for name, per_patient in values.items():
        mean = mean_of(per_patient)
        paired = None
        if reference is not None:
            if len(reference.get(name, ())) != len(per_patient):
                raise DataError(f"site {site} measured {REFERENCE} on other patients; start a run in another folder")
            paired = mean_of(reference[name] - per_patient).error
        result = Result(mean, paired)
        if least > 1:
            result = _coarse(result) if mean.count >= LEAST_PATIENTS else Result(replace(mean, error=None))
        found[name] = result
    return found


def _coarse(result: Result) -> Result:
    error, paired = result.mean.error, result.paired
    return Result(
        replace(result.mean, error=None if error is None else two_digits(error)),
        None if paired is None else two_digits(paired),
    )

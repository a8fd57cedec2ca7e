"""What a site measured of each test patient: it stays in the site's folders, and only means of it leave.

A row is one way of getting images at the site, a model or a baseline. The site keeps every row's values, patient by
patient, so that it can give the standard error of a paired difference. There is one row that others are compared with:
with all pairs a coordinator could choose would come every second moment of the rows, which no comparison needs.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wardround.errors import DataError, JournalError, Rejected, Withheld
from wardround.federation.measuring import BASELINE, CONTINUED, FINETUNED, REFERENCE
from wardround.plan.sums import PairedMean, evaluation_entries
from wardround.protection.secret import SecretRoot, SecretStream
from wardround.site.cohorts import kept_back
from wardround.site.egress import EgressRules
from wardround.site.measured import MeasuredSets
from wardround.storage.cipher import StoreCipher
from wardround.tasks.estimates import LEAST_PATIENTS, WITHHELD, Mean, mean_of, two_digits
from wardround.tasks.resampling import resampled_error
from wardround.tasks.states import Kind, PatientMean, value_of
from wardround.tasks.task import Charted, Dataset, MetricSpec, Named, Split
from wardround.wire.canonical import digest
from wardround.wire.files import write_text
from wardround.wire.message import Header

if TYPE_CHECKING:
    from wardround.learning.training import Learner

Array = npt.NDArray[Any]
# Writes a record of an event into the site's log.
Note = Callable[[str, Mapping[str, Any]], None]
# Beside the table: by row, the `Charts` of a task that has some.
CHARTS = "charts.json"
COLUMNS = ("patient", "folder", "row", "metric", "value")


class PatientRows:
    """The rows of one site in one run, in `folder` (sealed with a `cipher`), or in memory without a folder.

    With `table`, a path in the site's own folder, all rows are written there too, readable: for the eyes of a person
    who has the patients.
    """

    def __init__(
        self, folder: Path | None = None, cipher: StoreCipher | None = None, table: Path | None = None
    ) -> None:
        self._folder, self._cipher, self._table = folder, cipher, table
        self._rows: dict[str, dict[str, Array]] = {}
        self._kinds: dict[str, Kind] = {}

    def keep(
        self,
        row: str,
        values: Mapping[str, Array],
        names: Sequence[str],
        specs: Sequence[MetricSpec] = (),
        charted: Charted | None = None,
    ) -> None:
        """Keep a row's values, metric -> (n, *shape), and write the table anew; `names` go there alone.

        The table holds the values that a patient has by himself, as `specs` say, and beside it stand the charts of what
        is `charted`. What was kept of the row before is replaced: measured again, it is the same.
        """
        self._rows[row] = dict(values)
        self._kinds |= {spec.name: spec.kind for spec in specs}
        if self._folder is not None:
            self._write(row, values)
        if self._table is not None:
            self._write_table(self._table, names)
            if charted is not None:
                drawn = {name: charted.charts(found).model_dump() for name, found in self._all().items()}
                write_text(self._table.with_name(CHARTS), json.dumps(drawn))

    def of(self, row: str) -> dict[str, Array] | None:
        """A row's values, if the site measured it in this run."""
        if row not in self._rows and self._folder is not None and self._path(row).exists():
            text = self._path(row).read_text(encoding="utf-8")
            plain = json.loads(text if self._cipher is None else self._cipher.open(text, row))
            self._rows[row] = {name: _unpacked(per_patient) for name, per_patient in plain.items()}
        return self._rows.get(row)

    def reread(self) -> None:
        """Forget what is in memory of rows that are on the disk: another process changed them."""
        if self._folder is not None:
            self._rows.clear()

    def drop(self, rows: Sequence[str], places: Sequence[int] | None, patients: int, names: Sequence[str]) -> None:
        """Take patients out of rows of so many patients: those at some `places`, in their order.

        Without places whole rows go, for none says whose its values are. Out of the table go lines of these `names`.
        """
        for row in rows:
            values = self.of(row)
            if values is None:
                continue
            left = {
                metric: np.delete(own, places, axis=0) if places is not None and len(own) == patients else own
                for metric, own in values.items()
            }
            if places is None:
                del self._rows[row]
            else:
                self._rows[row] = left
            if self._folder is not None and places is None:
                self._path(row).unlink(missing_ok=True)
            elif self._folder is not None:
                self._write(row, left)
        if self._table is not None and self._table.exists():
            self._table.with_name(CHARTS).unlink(missing_ok=True)
            text = io.StringIO()
            lines = csv.reader(io.StringIO(self._table.read_text(encoding="utf-8")))
            csv.writer(text, lineterminator="\n").writerows(line for line in lines if line[1] not in names)
            write_text(self._table, text.getvalue())

    def _write(self, row: str, values: Mapping[str, Array]) -> None:
        plain = json.dumps({name: _packed(per_patient) for name, per_patient in values.items()})
        # On disk before the answer: one that outlived its row would leave the others nothing to compare with.
        write_text(self._path(row), plain if self._cipher is None else self._cipher.seal(plain, row), durable=True)

    def _path(self, row: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{row.replace('/', '-')}.json"

    def _write_table(self, path: Path, names: Sequence[str]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row, values in self._all().items():
            for metric, per_patient in values.items():
                kind = self._kinds.get(metric)
                own = per_patient if kind is None else kind.each(per_patient)
                for number, value in enumerate(() if own is None else own):
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
        note: Note,
    ) -> None:
        self._site, self._arm, self._baselines = site, arm, baselines
        self._egress, self._rows, self._sets, self._note = egress, rows, sets, note

    def row(self, header: Header) -> str:
        """The row that a request asks for; raises `Rejected` for one that the study does not have."""
        evaluator = header.meta.get("evaluator")
        if evaluator == FINETUNED:
            return FINETUNED
        if evaluator not in (BASELINE, CONTINUED):
            return self._arm
        # The release that a study continues is a row of its own, which no request may give another name.
        name = CONTINUED if evaluator == CONTINUED else header.meta.get(BASELINE)
        if name not in self._baselines:
            raise Rejected(f"site {self._site} is asked for a baseline that the study does not have")
        return str(name)

    def entries(self, header: Header, values: Mapping[str, Array], learner: Learner, root: bytes) -> dict[str, Any]:
        """The entries of a row, and its patients' values kept here; patients are drawn anew from the secret `root`.

        Raises `Withheld` where the site's rules keep them, `Rejected` for another comparison than with the reference
        row, and `JournalError` where that was not measured yet.
        """
        row, against, dataset = self.row(header), header.meta.get("against"), learner.dataset
        if against not in (None, REFERENCE):
            raise Rejected(f"site {self._site} compares rows with {REFERENCE} alone")
        if (why := self.withheld("test", values, learner)) is not None:
            raise Withheld(f"site {self._site} withholds its own results: {why}")
        reference = self._rows.of(REFERENCE) if against else None
        if against and reference is None:
            raise JournalError(f"site {self._site} has no row {REFERENCE} to compare with; measure that one first")
        specs = learner.task.metrics
        stays = self.kept_back("test", header.round, values, learner, hidden=True)
        names = dataset.names("test") if isinstance(dataset, Named) else ()
        self._rows.keep(row, values, names, specs, learner.task if isinstance(learner.task, Charted) else None)
        results = results_of(self._site, specs, values, reference, least=self._egress.least, root=root)
        return evaluation_entries(specs, results | dict.fromkeys(stays, PairedMean(WITHHELD)))

    def withheld(self, split: Split, values: Mapping[str, Array], learner: Learner) -> str | None:
        """Why what is summed over these patients may not leave; where it may, the set is on record from now on."""
        egress, dataset, specs = self._egress, learner.dataset, learner.task.metrics
        if (why := egress.refusal(values)) is not None or egress.least == 1 or self._sets is None:
            return why
        names = dataset.names(split) if isinstance(dataset, Named) else None
        return self._sets.join(split, names, _identity(dataset, specs, values), egress.least)

    def kept_back(
        self, split: Split, number: int, values: Mapping[str, Array], learner: Learner, *, hidden: bool
    ) -> frozenset[str]:
        """The metrics of a measurement that may leave whose own numbers may not; on record with the reason.

        Of test patients values leave, of validation patients sums, which are `hidden` or not. The patients who have a
        value of a metric are a measured set as all are.
        """
        specs, dataset, egress = learner.task.metrics, learner.dataset, self._egress
        sums = split == "validation"
        stays = kept_back(specs, values, egress.least, bins=sums and not hidden)
        if egress.least > 1 and self._sets is not None and isinstance(dataset, Named):
            names = dataset.names(split)
            for spec in specs:
                if spec.counts_apart and spec.name not in stays:
                    having = spec.kind.counted(values[spec.name])
                    part = [patient for patient, has in zip(names, having, strict=True) if has]
                    why = self._sets.join(split, part, "", egress.least) if part else None
                    stays |= {} if why is None else {spec.name: f"{spec.name}: {why}"}
        for why in sorted(set(stays.values())):
            self._note("blocked", {"kind": split, "round": number, "reason": why})
        # Metrics of one source have one sum.
        sources = {spec.key for spec in specs if spec.name in stays} if sums else set()
        return frozenset(stays) | {spec.name for spec in specs if spec.key in sources}


def _identity(dataset: Dataset, specs: Sequence[MetricSpec], values: Mapping[str, Array]) -> str:
    """What data without names are known by: their fingerprint, and which patients have a value of each metric."""
    parts = {s.name: s.kind.counted(values[s.name]).tolist() for s in specs if s.counts_apart and s.name in values}
    return digest([dataset.fingerprint(), parts]) if parts else dataset.fingerprint()


def results_of(
    site: str,
    specs: Sequence[MetricSpec],
    values: Mapping[str, Array],
    reference: Mapping[str, Array] | None,
    *,
    least: int,
    root: bytes,
) -> dict[str, PairedMean]:
    """What may leave of a row: n, value and standard errors; the paired ones where there is a `reference`.

    Where fewer than `LEAST_PATIENTS` patients make an interval there is no standard error, unless the site's rules let
    single patients out anyway (`least` of 1). Otherwise it has two digits. Standard errors of what is no mean come from
    patients drawn anew from the secret `root`, always the same ones of as many. Raises `DataError` for a reference of
    other patients.
    """
    found: dict[str, PairedMean] = {}
    for spec in specs:
        rows = values[spec.name]
        if reference is not None and len(reference.get(spec.name, ())) != len(rows):
            raise DataError(f"site {site} measured {REFERENCE} on other patients; start a run in another folder")
        stream = SecretStream(SecretRoot(root).key("resampling", site, len(rows)))
        result = _result(spec, rows, None if reference is None else reference[spec.name], stream.generator)
        if least > 1:
            few = result.mean.count < LEAST_PATIENTS
            result = PairedMean(replace(result.mean, error=None)) if few else _coarse(result)
        found[spec.name] = result
    return found


def _result(
    spec: MetricSpec, rows: Array, reference: Array | None, random: Callable[[], np.random.Generator]
) -> PairedMean:
    counted = spec.kind.counted(rows)
    absent = int((~counted).sum())
    simple = isinstance(spec.kind, PatientMean)
    if simple:
        mean = replace(mean_of(rows[counted]), absent=absent)
    else:
        mean = Mean(value_of(spec, rows), resampled_error(spec, rows, random()), int(counted.sum()), absent)
    if math.isnan(mean.value):
        # Patients have what is counted, but together no value: all of them healthy, say.
        return PairedMean(Mean(math.nan, None, 0, len(rows)))
    if reference is None:
        return PairedMean(mean)
    if simple and np.array_equal(counted, spec.kind.counted(reference)):
        return PairedMean(mean, mean_of(reference[counted] - rows[counted]).error)
    return PairedMean(mean, resampled_error(spec, rows, random(), reference))


def _packed(values: Array) -> Any:
    """Values for JSON: (n,) as they are, rows of many numbers by those that are not 0."""
    if values.ndim == 1:
        return values.tolist()
    flat = values.reshape(-1)
    at = np.flatnonzero(flat)
    return {"shape": list(values.shape), "at": at.tolist(), "is": flat[at].tolist()}


def _unpacked(packed: Any) -> Array:
    if isinstance(packed, list):
        return np.array(packed, dtype=np.float64)
    values = np.zeros(math.prod(packed["shape"]))
    values[packed["at"]] = packed["is"]
    return values.reshape(packed["shape"])


def _coarse(result: PairedMean) -> PairedMean:
    error, paired = result.mean.error, result.paired
    return PairedMean(
        replace(result.mean, error=None if error is None else two_digits(error)),
        None if paired is None else two_digits(paired),
    )

"""What is summed beside a model: the entries of a training round and of an evaluation, written and read. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from wardround.tasks.estimates import WITHHELD, Mean
from wardround.tasks.states import MAX_PATIENTS, MetricState, Part, PatientMean, check_metrics, state_of
from wardround.wire.update import Aggregate, Metric

if TYPE_CHECKING:
    from wardround.tasks.task import MetricSpec

Array = npt.NDArray[Any]
LOSS = "loss"
SECONDS = "seconds"
# Of a validation, which may travel in a training round; and of an evaluation, which travels alone.
_VALIDATED, _VALIDATION = "validation_patients", "validation/"
_COUNT, _BROKEN = "validation_count/", "validation_broken/"
_PATIENTS, _VALUE, _ERROR, _PAIRED = "patients", "value/", "error/", "paired/"
_WITH, _ABSENT = "patients/", "absent/"
MAX_LOSS = 1e6


def validation_metrics(specs: Sequence[MetricSpec]) -> tuple[Metric, ...]:
    """Sums over validation patients of every metric's state, and the patients' number.

    Raises `StudyError` for two metrics of one name, or of one source and different states.
    """
    check_metrics(specs)
    entries = {_VALIDATED: Metric(_VALIDATED, 0, MAX_PATIENTS, 1)}
    for s in specs:
        for part in s.kind.parts(s):
            name = _entry(part, s)
            low, high = part.low * MAX_PATIENTS, part.high * MAX_PATIENTS
            entries[name] = Metric(name, low, high, part.resolution, part.size)
        if not isinstance(s.kind, PatientMean):
            # Metrics of one source may read different patients of it.
            entries[_BROKEN + s.name] = Metric(_BROKEN + s.name, 0, 1, 1)
        elif s.may_be_absent:
            entries[_COUNT + s.name] = Metric(_COUNT + s.name, 0, MAX_PATIENTS, 1)
    return tuple(entries.values())


def validation_sums(specs: Sequence[MetricSpec], rows: Mapping[str, Array]) -> dict[str, Any]:
    """A site's entries: from what each patient adds to each metric, (n, *shape); nothing of metrics not in `rows`."""
    entries: dict[str, Any] = {_VALIDATED: max(map(len, rows.values()), default=0)}
    for s in specs:
        if s.name not in rows:
            continue
        state, at = state_of(s, rows[s.name]), 0
        # With a patient for whom the network gave no number the value is the worst, whatever the others add: their sum
        # would be of fewer patients than were counted.
        hidden = state.broken > 0 and not isinstance(s.kind, PatientMean)
        flat = np.zeros_like(state.total.reshape(-1)) if hidden else state.total.reshape(-1)
        for part in s.kind.parts(s):
            entries[_entry(part, s)] = float(flat[at]) if part.size == 1 else flat[at : at + part.size]
            at += part.size
        # No more than the value needs: of a mean how many patients it is of, of a sum whether it is one.
        if not isinstance(s.kind, PatientMean):
            entries[_BROKEN + s.name] = int(state.broken > 0)
        elif s.may_be_absent:
            entries[_COUNT + s.name] = int(state.count)
    return entries


class Sums(Protocol):
    """What metrics are read from: entries by name, summed over sites."""

    @property
    def metrics(self) -> Mapping[str, Array]:
        """Entry -> (size,), decoded."""
        ...


@dataclass(frozen=True)
class MergedSums:
    """Validation entries of several exchanges, added."""

    metrics: Mapping[str, Array]


def merged(specs: Sequence[MetricSpec], parts: Sequence[Sums]) -> MergedSums:
    """The validation sums of several exchanges as one, as if their sites had answered in a single one.

    Entries are whole numbers of steps, so sums in double precision differ by less than a value's last digit shown.
    """
    names = [metric.name for metric in validation_metrics(specs)]
    return MergedSums({name: np.sum([part.metrics[name] for part in parts], axis=0) for name in names})


def validation_values(sums: Sums, specs: Sequence[MetricSpec]) -> dict[str, float] | None:
    """Every metric that has a value, over the validation patients of all sites.

    `None` where sites have no validation patient, or keep what they measured to themselves.
    """
    if not sums.metrics[_VALIDATED][0]:
        return None
    values = {s.name: float(np.round(s.kind.value(s, validation_state(sums, s)), 9)) for s in specs}
    return {name: value for name, value in values.items() if not np.isnan(value)}


def validation_state(sums: Sums, spec: MetricSpec) -> MetricState:
    """A metric's state over the validation patients of all sites, as far as its value needs it.

    Without a `count` of what is no mean; `broken` is the number of sites where a patient's row is not a number.
    """
    found, none = sums.metrics, np.zeros(())
    total = np.concatenate([found[_entry(part, spec)] for part in spec.kind.parts(spec)]).reshape(spec.kind.shape)
    if not isinstance(spec.kind, PatientMean):
        return MetricState(total, none, found[_BROKEN + spec.name][0])
    return MetricState(total, found[_COUNT + spec.name if spec.may_be_absent else _VALIDATED][0], none)


def _entry(part: Part, spec: MetricSpec) -> str:
    return f"{_VALIDATION}{part.name}{spec.key}"


def round_metrics(specs: Sequence[MetricSpec], *, private: bool = False) -> tuple[Metric, ...]:
    """What a training round sums beside the model: loss, seconds, and the validation of the incoming model.

    With privacy no loss: it is one of training patients, and carries no noise.
    """
    return (
        *(() if private else (Metric(LOSS, -MAX_LOSS, MAX_LOSS, 1e-7),)),
        Metric(SECONDS, 0, 1e7, 1e-3),
        *validation_metrics(specs),
    )


def evaluation_metrics(specs: Sequence[MetricSpec]) -> tuple[Metric, ...]:
    """A site's own results: the number of test patients, and of every metric value and standard errors, rounded.

    A metric that patients can be without also has numbers of those with and without a value. A standard error of one
    step below 0 is one that the site does not give.
    """
    metrics = [Metric(_PATIENTS, 0, MAX_PATIENTS, 1)]
    for s in specs:
        step, widest = s.resolution, s.high - s.low
        if s.counts_apart:
            metrics.extend(Metric(name + s.name, 0, MAX_PATIENTS, 1) for name in (_WITH, _ABSENT))
        metrics.append(Metric(_VALUE + s.name, min(0.0, s.low), max(0.0, s.high), step))
        metrics.append(Metric(_ERROR + s.name, -step, widest, step))
        metrics.append(Metric(_PAIRED + s.name, -step, 2.0 * widest, step))
    return tuple(metrics)


@dataclass(frozen=True)
class PairedMean:
    """A metric at a site, and the standard error of its difference to the reference row, paired by patient."""

    mean: Mean
    paired: float | None = None


def evaluation_entries(specs: Sequence[MetricSpec], results: Mapping[str, PairedMean]) -> dict[str, Any]:
    """A site's entries, from every metric's result.

    A metric that is withheld has 0 patients with a value and 0 without.
    """
    entries: dict[str, Any] = {}
    for s in specs:
        found = results[s.name]
        hidden = -s.resolution
        if s.counts_apart:
            entries |= {_WITH + s.name: found.mean.count, _ABSENT + s.name: found.mean.absent}
        else:
            entries[_PATIENTS] = found.mean.count
        entries |= {
            _VALUE + s.name: found.mean.value if found.mean.count else 0.0,
            _ERROR + s.name: hidden if found.mean.error is None else found.mean.error,
            _PAIRED + s.name: hidden if found.paired is None else found.paired,
        }
    return entries


def results_in(aggregate: Aggregate, specs: Sequence[MetricSpec]) -> dict[str, PairedMean]:
    """Every metric's result, from a site's entries."""

    def number(name: str) -> float:
        return float(aggregate.metrics[name][0])

    def error(name: str, step: float) -> float | None:
        return None if number(name) < -0.5 * step else max(0.0, number(name))

    found: dict[str, PairedMean] = {}
    for s in specs:
        count = int(number(_WITH + s.name if s.counts_apart else _PATIENTS))
        absent = int(number(_ABSENT + s.name)) if s.counts_apart else 0
        if count:
            mean = Mean(number(_VALUE + s.name), error(_ERROR + s.name, s.resolution), count, absent)
            found[s.name] = PairedMean(mean, error(_PAIRED + s.name, s.resolution))
        else:
            found[s.name] = PairedMean(Mean(np.nan, None, 0, absent) if absent else WITHHELD)
    return found

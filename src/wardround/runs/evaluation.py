"""Measures the released models of all arms on every site's test patients, through the same seam as training.

`wardround run` ends with this and `wardround evaluate` repeats it, so every number can be recomputed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from wardround.errors import DataError
from wardround.federation.exchange import EVALUATE, Call, Engine, ask_one
from wardround.federation.measuring import BASELINE, CONTINUED, FINETUNED, OWN, REFERENCE, RELEASED
from wardround.federation.refusals import is_withheld
from wardround.federation.release import as_tensor_file, model_of_study, model_path
from wardround.plan.arms import FEDERATED, LOCAL, POOLED
from wardround.plan.sums import PairedMean, results_in
from wardround.results.gate import gate_of, margins_of
from wardround.results.metrics import MetricInfo
from wardround.results.schema import ALIAS, Compared, Estimate, LeftOut, Measured, Row, Table
from wardround.runs.context import Context
from wardround.runs.parts import parts_of
from wardround.runs.watching import TESTING, TUNING, Phase
from wardround.study.registry import BASELINES, baseline
from wardround.tasks.estimates import Mean, difference, estimate, mean_of_sites
from wardround.tasks.estimates import PatientEstimate as Found
from wardround.tasks.task import ComparesUntrained, MetricSpec
from wardround.wire.message import EMPTY_SHA256, EmptyBody, FileBody, Message
from wardround.wire.tensors import TensorFile

Results = Mapping[str, PairedMean]
Means = Mapping[str, Mean]
MEAN, UNSEEN = "mean", "unseen"


@dataclass(frozen=True)
class SiteMeasurement:
    """One arm's model (or a baseline) at one site: what it gave, or why nothing, and whether its rules say so."""

    row: str
    site: str
    results: Results | None
    reason: str = ""
    withheld: bool = False


@dataclass(frozen=True)
class _Job:
    row: str
    site: str
    call: Call

    @property
    def phase(self) -> str:
        """A site tunes a baseline when it is first asked for it."""
        return TUNING if self.call.meta["evaluator"] == BASELINE else TESTING


def measure(host: Context, engine: Engine, phase: Phase = lambda *_: None, *, again: str = "") -> list[SiteMeasurement]:
    """Evaluate every released model and baseline at every site where the comparison needs it.

    `phase` is called with each phase and its numbers of finished and of all evaluations. Sites answer what they were
    asked before from their stores, unless `again` is a new text. Raises `DataError` when a model is missing.
    """
    jobs = sorted(_jobs(host), key=lambda job: job.row != REFERENCE)
    totals = Counter(job.phase for job in jobs)
    finished: dict[str, int] = {}
    counting = threading.Lock()

    def run(job: _Job, *, compared: bool) -> SiteMeasurement:
        with counting:
            if job.phase not in finished:
                finished[job.phase] = 0
                phase(job.phase, 0, totals[job.phase])
        meta = {**job.call.meta} | ({"again": again} if again else {}) | ({"against": REFERENCE} if compared else {})
        answer = ask_one(engine, replace(job.call, meta=meta))
        with counting:
            finished[job.phase] += 1
            phase(job.phase, finished[job.phase], totals[job.phase])
        if isinstance(answer, Message):
            reason = str(answer.header.meta.get("reason", "no reason given"))
            return SiteMeasurement(job.row, job.site, None, reason, is_withheld(answer))
        return SiteMeasurement(job.row, job.site, results_in(answer, host.task.metrics))

    # One evaluation of a site at a time: a site writes its own picture file, and compares with its first row.
    by_site: dict[str, list[_Job]] = {}
    for job in jobs:
        by_site.setdefault(job.site, []).append(job)

    def run_site(of_site: list[_Job]) -> list[SiteMeasurement]:
        found: list[SiteMeasurement] = []
        compared = False
        for job in of_site:
            found.append(run(job, compared=compared))
            compared = compared or (job.row == REFERENCE and found[-1].results is not None)
        return found

    longest_first = sorted(by_site.values(), key=len, reverse=True)
    with ThreadPoolExecutor(len(by_site)) as pool:
        try:
            return [m for measurements in pool.map(run_site, longest_first) for m in measurements]
        except BaseException:
            # Leaving the pool waits for its threads, and they wait for the engine.
            engine.close()
            raise


def _jobs(host: Context) -> Iterator[_Job]:
    """Every row at every site that measures it."""
    study = host.study
    everywhere = host.remaining(study.sites)
    for name in study.baselines:
        for site in everywhere:
            meta: dict[str, Any] = {"evaluator": BASELINE, BASELINE: name, "split": "test", "picture": name}
            yield _Job(name, site, _call(host, FEDERATED, site, meta, None))
    if study.continues is not None:
        for site in everywhere:
            yield _Job(CONTINUED, site, _call(host, FEDERATED, site, {"evaluator": CONTINUED, "split": "test"}, None))
    for name, arm in host.arms.items():
        if arm.inside(study):
            (site,) = arm.sites
            meta = {"evaluator": OWN, "split": "test", "picture": "local"}
            yield _Job(name, site, _call(host, name, site, meta, None))
            continue
        folder = arm.folder
        path = model_path(host.out, folder)
        if not path.exists():
            raise DataError(f"models/{path.name} is missing: the run is not finished; run it again to resume")
        # Sites have what never changes.
        frozen = frozenset(host.arm_spec(name).policy.names("frozen"))
        model = model_of_study(path, host.study_sha256, host.plan_sha256)
        body = as_tensor_file(model, host.out / "work" / "released" / folder, frozen)
        left_out = name.removeprefix("without/") if name.startswith("without/") else None
        for site in everywhere if left_out is None else (left_out,):
            trained_here = site in arm.members
            shown = name.partition("/")[0] if trained_here or name in (FEDERATED, POOLED) else None
            meta = {
                "evaluator": RELEASED,
                "split": "test",
                "picture": shown,
                "unseen_site": not trained_here,
                "model": body[1],
            }
            yield _Job(name, site, _call(host, name, site, meta, body))
    if study.update is not None and study.update.finetune is not None and study.trains:
        # Each made its own when it tested the released one, which comes before.
        for site in host.remaining(study.training_sites):
            meta = {"evaluator": FINETUNED, "split": "test"}
            yield _Job(FINETUNED, site, _call(host, FEDERATED, site, meta, None))


def _call(host: Context, arm: str, site: str, meta: Mapping[str, Any], body: tuple[TensorFile, str] | None) -> Call:
    arm_spec = host.arm_spec(arm)
    file, sha = body if body is not None else (None, EMPTY_SHA256)
    return Call(
        kind=EVALUATE,
        study=arm_spec.identity,
        round=host.study.schedule.rounds,
        sites=(site,),
        layout=arm_spec.evaluation_layout,
        scales={},
        meta=meta,
        tensors=() if file is None else file.table,
        body=EmptyBody() if file is None else FileBody(file.path, file.nbytes),
        body_sha256=sha,
    )


# From measurements to the tables of result.json -------------------------------------------------------------------


def tables(host: Context, measurements: Sequence[SiteMeasurement]) -> Measured:
    """What result.json says of the measurements."""
    specs = host.task.metrics
    training = host.remaining(host.study.averaged_sites)
    found = {(m.row, m.site): m for m in measurements}

    def results(row: str, site: str) -> Results | None:
        measurement = found.get((row, site))
        return None if measurement is None else measurement.results

    # In the study's order, and not in that of measuring.
    order = (*host.study.compared_rows, *host.arms, FINETUNED)
    rows = sorted({m.row for m in measurements if "/" not in m.row}, key=order.index)
    compared = {row: {site: results(row, site) for site in host.study.sites} for row in rows}
    alone = {site: results(f"local/{site}", site) for site in training}
    if any(alone.values()):
        compared["local"] = alone
    metrics: dict[str, Table] = {row: _row(specs, training, sites) for row, sites in compared.items()}
    baselines = {name: _compared(host, name) for name in host.study.baselines}
    if baselines:
        metrics[ALIAS] = metrics[next(iter(baselines))]
    left_out = _left_out(specs, training, results)
    for row, key in ((FEDERATED, "federated"), ("local", "best_local")):
        sites = [_means(entry[key]) for entry in left_out.values() if key in entry]
        if sites and row in metrics:
            metrics[row][UNSEEN] = over_sites(specs, sites)
    found_in_all = Measured(
        metric_specs=tuple(MetricInfo(**spec.to_json()) for spec in specs),
        metrics=metrics,
        baselines=baselines,
        gains={FEDERATED: _gains(specs, compared, training, everywhere=tuple(host.study.sites))},
        left_out={
            site: LeftOut(**{key: at_site(specs, _means(results)) for key, results in entry.items()})
            for site, entry in left_out.items()
        },
        elsewhere=_elsewhere(host, results),
        withheld={m.site: m.reason for m in measurements if m.results is None and m.withheld},
        failed={
            **dict.fromkeys(sorted(host.without), "the run went on without it (--without)"),
            **{m.site: m.reason for m in measurements if m.results is None and not m.withheld},
        },
        parts=parts_of(host.task, metrics),
    )
    return _gated(host, found_in_all)


def _gated(host: Context, measured: Measured) -> Measured:
    """The same with what the gate says, in a study that continues a release."""
    update = host.study.update
    if update is None:
        return measured
    margins = margins_of(update.margins, measured.metric_specs)
    # A site that the run went on without cannot say that it does not lose.
    return measured.model_copy(update={"gate": gate_of(measured, tuple(host.study.sites), margins)})


def _compared(host: Context, name: str) -> Compared:
    """What a baseline is; of a task that has its own, at least its name."""
    task = host.task
    if isinstance(task, ComparesUntrained) and name in task.untrained:
        label, description = task.untrained[name]
        return Compared(label=label, description=description)
    if name not in BASELINES and host.study.task.classical is None:
        return Compared(label=name.replace("_", " "), description="nothing learned")
    found = baseline(name) if name in BASELINES else host.plugins.baseline(name, host.study.modality)
    return Compared(label=found.label, description=found.description)


def _row(specs: Sequence[MetricSpec], training: Sequence[str], sites: Mapping[str, Results | None]) -> Table:
    row: Table = {site: None if results is None else at_site(specs, _means(results)) for site, results in sites.items()}
    # A mean over some of the sites would look like one over all of them.
    present = [_means(results) for site in training if (results := sites.get(site)) is not None]
    row[MEAN] = over_sites(specs, present) if len(present) == len(training) else None
    return row


def _gains(
    specs: Sequence[MetricSpec],
    rows: Mapping[str, Mapping[str, Results | None]],
    training: Sequence[str],
    everywhere: Sequence[str],
) -> dict[str, Table]:
    """The federation against every other row, paired by patient: positive where the federation is better.

    Of training sites; against the release that the study continues, which no site may lose, of all sites.
    """
    ours = rows.get(FEDERATED, {})
    gains: dict[str, Table] = {}
    for row, theirs in rows.items():
        if row == FEDERATED:
            continue
        sites: dict[str, Means] = {}
        for site in everywhere if row == CONTINUED else training:
            mine, other = ours.get(site), theirs.get(site)
            if mine is not None and other is not None:
                sites[site] = {s.name: _gain(s, mine[s.name], other[s.name]) for s in specs}
        table: Table = {site: at_site(specs, means) for site, means in sites.items()}
        if sites.keys() >= set(training):
            table[MEAN] = over_sites(specs, [sites[site] for site in training])
        gains[row] = table
    return gains


def _gain(spec: MetricSpec, mine: PairedMean, other: PairedMean) -> Mean:
    return difference(mine.mean, other.mean, other.paired, larger_is_better=spec.larger_is_better)


def _elsewhere(host: Context, results: Callable[[str, str], Results | None]) -> dict[str, Table]:
    """Each site's own model at every site; nothing of those that never left their site."""
    specs, found = host.task.metrics, dict[str, Table]()
    for name, arm in host.arms.items():
        if name.startswith(LOCAL) and not arm.inside(host.study):
            sites = {site: results(name, site) for site in host.study.sites}
            rows = {site: at_site(specs, _means(one)) for site, one in sites.items() if one is not None}
            if rows:
                found[name.removeprefix(LOCAL)] = {site: row for site, row in rows.items() if row is not None}
    return found


def _left_out(
    specs: Sequence[MetricSpec], training: Sequence[str], results: Callable[[str, str], Results | None]
) -> dict[str, dict[str, Results]]:
    """For each institution left out once: the model trained without it, and the best of the other sites' own models.

    The best local model is chosen with hindsight, on the test patients of the left-out site: harder to beat than any
    choice that could be made beforehand.
    """
    found: dict[str, dict[str, Results]] = {}
    for site in training:
        entry: dict[str, Results] = {}
        without = results(f"without/{site}", site)
        if without is None:
            continue
        entry["federated"] = without
        others = [r for r in (results(f"local/{other}", site) for other in training if other != site) if r is not None]
        if others:
            first = specs[0]
            entry["best_local"] = max(others, key=lambda r: first.rank(r[first.name].mean.value))
        found[site] = entry
    return found


def _means(results: Results) -> Means:
    return {name: result.mean for name, result in results.items()}


def at_site(specs: Sequence[MetricSpec], means: Means) -> Row | None:
    """The row of a site in a table; nothing where no metric has a value."""
    return _row_of({s.name: estimate(means[s.name]) for s in specs})


def over_sites(specs: Sequence[MetricSpec], sites: Sequence[Means]) -> Row | None:
    """The row of the mean of sites, each of the same weight; nothing where no metric has a value."""
    return _row_of({s.name: mean_of_sites([means[s.name] for means in sites]) for s in specs})


def _row_of(estimates: Mapping[str, Found]) -> Row | None:
    """The row of result.json; nothing of a metric that no patient has, and nothing at all where that is true of all."""
    if not any(found.n for found in estimates.values()):
        return None
    return {
        name: Estimate.model_validate(found, from_attributes=True) if found.n else None
        for name, found in estimates.items()
    }

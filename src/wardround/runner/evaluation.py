"""Measures the released models of all arms on every site's test patients, through the same seam as training.

`wardround run` ends with this and `wardround evaluate` repeats it, so every number can be recomputed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from wardround.errors import DataError
from wardround.federation.exchange import EVALUATE, Call, Engine, ask_one
from wardround.federation.refusals import is_withheld
from wardround.federation.sums import patient_means
from wardround.runner.arms import FEDERATED, POOLED
from wardround.runner.evaluators import BASELINE, RELEASED
from wardround.runner.host import Host
from wardround.runner.release import as_tensor_file, model_of_study, model_path
from wardround.tasks.metrics import Estimate, PatientMeans, mean_of_sites
from wardround.tasks.task import MetricSpec
from wardround.wire.message import EMPTY_SHA256, EmptyBody, FileBody, Message
from wardround.wire.tensors import TensorFile

Means = dict[str, PatientMeans]
MEAN, UNSEEN = "mean", "unseen"


@dataclass(frozen=True)
class Measurement:
    """One arm's model (or a baseline) at one site: its sums, or why there are none, and whether its rules say so."""

    row: str
    site: str
    means: Means | None
    reason: str = ""
    withheld: bool = False


@dataclass(frozen=True)
class _Job:
    row: str
    site: str
    call: Call


def measure(
    host: Host, engine: Engine, done: Callable[[int, int], None] | None = None, *, again: str = ""
) -> list[Measurement]:
    """Evaluate every released model and baseline at every site where the comparison needs it.

    `done` is called with the number of finished and of all evaluations. Sites answer what they were asked before from
    their stores, unless `again` is a new text. Raises `DataError` when a model is missing.
    """
    jobs = list(_jobs(host))
    finished, counting = 0, threading.Lock()

    def run(job: _Job) -> Measurement:
        nonlocal finished
        answer = ask_one(engine, replace(job.call, meta={**job.call.meta, "again": again}) if again else job.call)
        with counting:
            finished += 1
            if done is not None:
                done(finished, len(jobs))
        if isinstance(answer, Message):
            reason = str(answer.header.meta.get("reason", "no reason given"))
            return Measurement(job.row, job.site, None, reason, is_withheld(answer))
        return Measurement(job.row, job.site, patient_means(answer, host.task.metrics))

    # One evaluation of a site at a time: a site writes its own picture file.
    by_site: dict[str, list[_Job]] = {}
    for job in jobs:
        by_site.setdefault(job.site, []).append(job)

    def run_site(of_site: list[_Job]) -> list[Measurement]:
        return [run(job) for job in of_site]

    longest_first = sorted(by_site.values(), key=len, reverse=True)
    with ThreadPoolExecutor(len(by_site)) as pool:
        try:
            return [m for measurements in pool.map(run_site, longest_first) for m in measurements]
        except BaseException:
            # Leaving the pool waits for its threads, and they wait for the engine.
            engine.close()
            raise


def _jobs(host: Host) -> Iterator[_Job]:
    study = host.study
    everywhere = host.remaining(study.sites)
    for name in study.baselines:
        for site in everywhere:
            meta: dict[str, Any] = {"evaluator": BASELINE, "baseline": name, "split": "test", "picture": name}
            yield _Job(name, site, _call(host, FEDERATED, site, meta, None))
    for name, arm in host.arms.items():
        folder = arm.folder
        path = model_path(host.out, folder)
        if not path.exists():
            raise DataError(f"models/{path.name} is missing: the run is not finished; run it again to resume")
        body = as_tensor_file(model_of_study(path, host.study_sha256), host.out / "work" / "released" / folder)
        left_out = name.removeprefix("without/") if name.startswith("without/") else None
        for site in everywhere if left_out is None else (left_out,):
            trained_here = site in arm.members
            shown = name.partition("/")[0] if trained_here or name in (FEDERATED, POOLED) else None
            meta = {
                "evaluator": RELEASED,
                "split": "test",
                "picture": shown,
                "unknown_site": not trained_here,
                "model": body[1],
            }
            yield _Job(name, site, _call(host, name, site, meta, body))


def _call(host: Host, arm: str, site: str, meta: Mapping[str, Any], body: tuple[TensorFile, str] | None) -> Call:
    blueprint = host.blueprint(arm)
    file, sha = body if body is not None else (None, EMPTY_SHA256)
    return Call(
        kind=EVALUATE,
        study=blueprint.identity,
        round=host.study.schedule.rounds,
        sites=(site,),
        layout=blueprint.evaluation_layout,
        scales={},
        meta=meta,
        tensors=() if file is None else file.table,
        body=EmptyBody() if file is None else FileBody(file.path, file.nbytes),
        body_sha256=sha,
    )


# From measurements to the tables of result.json -------------------------------------------------------------------


def tables(host: Host, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """`metrics`, `gains`, `left_out`, `withheld` and `failed` of result.json."""
    specs = host.task.metrics
    training = host.remaining(host.study.training_sites)
    found = {(m.row, m.site): m for m in measurements}

    def means(row: str, site: str) -> Means | None:
        measurement = found.get((row, site))
        return None if measurement is None else measurement.means

    metrics: dict[str, dict[str, Any]] = {}
    rows = [row for row in dict.fromkeys(m.row for m in measurements) if "/" not in row]
    for row in rows:
        metrics[row] = _row(specs, training, {site: means(row, site) for site in host.study.sites})
    alone = {site: means(f"local/{site}", site) for site in training}
    if any(alone.values()):
        metrics["local"] = _row(specs, training, alone)
    baselines = host.study.baselines
    if baselines:
        metrics["baseline"] = metrics[baselines[0]]
    left_out = _left_out(specs, training, means)
    for row in ("federated", "local"):
        key = "federated" if row == "federated" else "best_local"
        sites = [entry[key] for entry in left_out.values() if key in entry]
        if sites and row in metrics:
            metrics[row][UNSEEN] = _json(specs, {s.name: mean_of_sites([m[s.name] for m in sites]) for s in specs})
    compared = {row: {site: means(row, site) for site in training} for row in rows}
    if any(alone.values()):
        compared["local"] = alone
    return {
        "metrics": metrics,
        "gains": _gains(specs, compared, training),
        "left_out": {
            site: {key: _json(specs, _estimates(specs, value)) for key, value in entry.items()}
            for site, entry in left_out.items()
        },
        "withheld": {m.site: m.reason for m in measurements if m.means is None and m.withheld},
        "failed": {
            **dict.fromkeys(sorted(host.without), "the run went on without it (--without)"),
            **{m.site: m.reason for m in measurements if m.means is None and not m.withheld},
        },
    }


def _row(specs: Sequence[MetricSpec], training: Sequence[str], sites: Mapping[str, Means | None]) -> dict[str, Any]:
    row: dict[str, Any] = {
        site: None if means is None else _json(specs, _estimates(specs, means)) for site, means in sites.items()
    }
    # A mean over some of the sites would look like one over all of them.
    present = [m for m in (sites.get(s) for s in training) if m is not None]
    complete = len(present) == len(training)
    row[MEAN] = _json(specs, {s.name: mean_of_sites([m[s.name] for m in present]) for s in specs}) if complete else None
    return row


def _gains(
    specs: Sequence[MetricSpec], rows: Mapping[str, Mapping[str, Means | None]], training: Sequence[str]
) -> dict[str, Any]:
    """The federation against every other row, paired by patient: positive where the federation is better.

    All rows share their bootstrap draws, so a replicate of the gain is the difference of two replicates.
    """
    ours = rows.get(FEDERATED, {})
    gains: dict[str, Any] = {}
    for row, theirs in rows.items():
        if row == FEDERATED:
            continue
        sites: dict[str, Means] = {}
        for site in training:
            mine, other = ours.get(site), theirs.get(site)
            if mine is not None and other is not None:
                sites[site] = {s.name: _gain(s, mine[s.name], other[s.name]) for s in specs}
        table: dict[str, Any] = {site: _json(specs, _estimates(specs, means)) for site, means in sites.items()}
        if len(sites) == len(training):
            table[MEAN] = _json(specs, {s.name: mean_of_sites([m[s.name] for m in sites.values()]) for s in specs})
        gains[row] = table
    return {FEDERATED: gains}


def _gain(spec: MetricSpec, mine: PatientMeans, other: PatientMeans) -> PatientMeans:
    sign = 1.0 if spec.larger_is_better else -1.0
    return PatientMeans(sign * (mine.total - other.total), mine.count, sign * (mine.replicates - other.replicates))


def _left_out(
    specs: Sequence[MetricSpec], training: Sequence[str], means: Callable[[str, str], Means | None]
) -> dict[str, dict[str, Means]]:
    """For each institution left out once: the model trained without it, and the best of the other sites' own models.

    The best local model is chosen with hindsight, on the test patients of the left-out site: harder to beat than any
    choice that could be made beforehand.
    """
    found: dict[str, dict[str, Means]] = {}
    for site in training:
        entry: dict[str, Means] = {}
        without = means(f"without/{site}", site)
        if without is None:
            continue
        entry["federated"] = without
        others = [m for m in (means(f"local/{other}", site) for other in training if other != site) if m is not None]
        if others:
            first = specs[0]
            sign = 1.0 if first.larger_is_better else -1.0
            entry["best_local"] = max(others, key=lambda m: sign * m[first.name].total)
        found[site] = entry
    return found


def _estimates(specs: Sequence[MetricSpec], means: Means) -> dict[str, Estimate]:
    return {s.name: means[s.name].compute() for s in specs}


def _json(specs: Sequence[MetricSpec], estimates: Mapping[str, Estimate]) -> dict[str, Any] | None:
    if not all(estimates[s.name].n for s in specs):
        return None
    return {
        s.name: {
            "value": round(estimates[s.name].value, 6),
            "ci_low": round(estimates[s.name].ci_low, 6),
            "ci_high": round(estimates[s.name].ci_high, 6),
            "n": estimates[s.name].n,
        }
        for s in specs
    }

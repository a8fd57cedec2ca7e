"""One run on one machine, from a study to its result files. Resumes by itself."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from wardround.engines.registry import Sites, engine_of
from wardround.errors import StudyError
from wardround.results.files import read_result
from wardround.results.schema import Measured, Result
from wardround.runs.conduct import conduct, shielded, stoppable
from wardround.runs.folder import alone, claim, near_in, other_defaults, record_near, without_in
from wardround.runs.grouped import measured
from wardround.runs.machine import Machine
from wardround.runs.remarks import remarks_on
from wardround.runs.trackers import Trackers
from wardround.runs.watching import Shielded, Watcher
from wardround.study.load import load_study, written
from wardround.study.schema import Study
from wardround.study.sites import SitesFile, load_sites
from wardround.wire.files import write_text

log = logging.getLogger(__name__)
SPEC = "spec.json"
_FACTORY = "wardround.runs.machine:site_finder"


def run(
    study: Study | str | Path | Mapping[str, Any],
    sites: SitesFile | str | Path,
    out: str | Path,
    *,
    compare: Sequence[str] = (),
    overrides: Sequence[str] = (),
    engine: str | None = None,
    processes: int | None = None,
    resume: bool = False,
    without: Sequence[str] = (),
    watcher: Watcher | None = None,
    quiet: bool = False,
    allow_code: bool = False,
    near: str | Path | None = None,
    track: Sequence[str] = (),
) -> Result:
    """Train a study, compare it with training alone and on pooled data, and write the result files into `out`.

    `allow_code` lets the study name any code (`task.factory: package.module:callable`), not only the plug-ins that the
    sites file allows: for your own study on your own machine. `start.file` and
    `task.teacher.file` of the study are relative to `near`: to the folder of the study's file, or without one to the
    working folder.

    A run that was stopped, by whatever, goes on where it was when the same call is made again; `resume` insists that
    there is something to go on with. A run whose data at a site changed since it began is refused; `without` names the
    sites to go on without, for good: the run records it, and its report says so. A line for each phase and round
    goes to stderr, unless the run is `quiet` or a `watcher` sees to that. `track` sends the numbers of `rounds.jsonl`
    to trackers, too: `tensorboard:FOLDER`, `mlflow` (a folder `mlruns` here) or `mlflow:URI`. Raises `StudyError`,
    `DataError`, `JournalError`, `NotEnoughSites`, `MissingExtra`, and `Interrupted` after Ctrl-C.

    >>> result = run("study.yaml", "sites.yaml", "out", compare=["local"], engine="local", quiet=True)
    >>> result.arms
    ('zero_filled', 'federated', 'local')
    >>> result.metric("federated", "mean", "psnr") > 0.0
    True
    >>> result.report.name
    'report.html'
    """
    trackers = Trackers.of(track, Path(out).absolute().name)
    watching = trackers.beside(shielded(watcher, quiet))
    near = near_of(study, near)
    host = open_host(study, sites, out, compare, overrides, watching, without, allow_code=allow_code, near=near)
    for remark in remarks_on(host.study, host.sites):
        log.warning("%s", remark)
    began = time.perf_counter()
    host.preflight(watching.phase)
    with closing(trackers), stoppable(), alone(host.out), closing(host):
        fingerprints = claim(host, resume=resume)
        record_near(host, near)
        host.open_stores()
        with _Carrier(host, engine, processes, watching) as carrier:
            host.build_operators(watching.phase, keep=carrier.parallel == 1)
            return conduct(host, carrier.engine, carrier.parallel, watching, fingerprints, began)


def evaluate(
    out: str | Path,
    sites: SitesFile | str | Path,
    *,
    engine: str | None = None,
    processes: int | None = None,
    watcher: Watcher | None = None,
    quiet: bool = False,
    allow_code: bool = False,
) -> Measured:
    """Recompute the metrics of result.json from the saved models of a finished run and the sites' data.

    `allow_code` is that of `run`.

    Raises `StudyError` and `DataError` where the run or its models are not what they were, and `JournalError` where
    there is no readable result.json, and while another process is at work in the folder. Says what it does as `run`
    does.

    >>> from wardround.results.files import read_result
    >>> again = evaluate("out", "sites.yaml", engine="local", quiet=True)
    >>> again.metrics == read_result("out").metrics
    True
    """
    out = Path(out)
    before = read_result(out)
    watching = shielded(watcher, quiet)
    study, near = out / "study.yaml", near_in(out)
    host = open_host(study, sites, out, before.compare, (), watching, allow_code=allow_code, near=near)
    if host.study_sha256 != before.study_sha256:
        raise StudyError("study.yaml in the run's folder is not the study of result.json; restore it")
    if host.plan_sha256 != before.plan_sha256:
        raise other_defaults(host)
    with alone(out), closing(host), _Carrier(host, engine, processes, watching) as carrier:
        # A number of its own: sites answer a request that they know from their store, and here they must measure.
        again = secrets.token_hex(16)
        return measured(host, carrier.engine, watching.phase, again=again)


def open_host(
    study: Study | str | Path | Mapping[str, Any],
    sites: SitesFile | str | Path,
    out: str | Path,
    compare: Sequence[str],
    overrides: Sequence[str],
    watcher: Shielded | None,
    without: Sequence[str] = (),
    *,
    allow_code: bool = False,
    near: str | Path | None = None,
) -> Machine:
    """The machine of a run: study and sites loaded and fitting each other, less the sites it goes on without.

    `near` is that of `run`.
    """
    near = near_of(study, near)
    if not isinstance(study, Study):
        study = load_study(study, overrides, near=near)
    elif overrides:
        study = load_study(written(study), overrides, near=near)
    if not isinstance(sites, SitesFile):
        sites = load_sites(sites)
    if allow_code:
        sites = sites.with_code()
    gone = without_in(Path(out)).union(without)
    for name, site in study.sites.items():
        if not site.scans and name not in gone:
            sites.of(name)
    entries = [entry for name, entry in sites.sites.items() if name in study.sites]
    places = study.places(near, entries)
    return Machine(study, sites, Path(out), tuple(compare), None if watcher is None else watcher.step, gone, places)


def near_of(study: Study | str | Path | Mapping[str, Any], near: str | Path | None) -> Path:
    """The folder to which the paths in a study are relative."""
    if near is None:
        near = Path(study).parent if isinstance(study, str | Path) else Path()
    return Path(near).absolute()


def _written_spec(host: Machine) -> Path:
    spec = host.out / "work" / SPEC
    write_text(spec, json.dumps(host.spec()))
    return spec


class _Carrier:
    """The engine of a run, closed when the run ends however it ends."""

    def __init__(self, host: Machine, name: str | None, processes: int | None, watcher: Shielded) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max((host.sites.threads(site) for site in host.study.sites), default=1)
        count = processes or (1 if name == "local" else host.processes(max(1, cores // threads)))
        make = engine_of(name or ("workers" if count > 1 else "local"))
        carried = make(Sites(host.find, _FACTORY, lambda: _written_spec(host), count, watcher.step))
        self.engine, self.parallel = carried.engine, carried.parallel

    def __enter__(self) -> _Carrier:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

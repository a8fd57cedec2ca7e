"""One run from a study to its result files: trains every arm, releases, measures, reports. Resumes by itself."""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors.numpy import load_file

from wardround.data.deidentify import describe_error
from wardround.engines.local import STOPPED, LocalEngine
from wardround.engines.workers import WorkersEngine
from wardround.errors import Interrupted, StudyError, WardroundError
from wardround.federation.blobs import disk_error
from wardround.federation.coordinator import Coordinator, Release
from wardround.federation.exchange import RELEASE, Call, Engine
from wardround.federation.journal import Journal, RoundReport
from wardround.federation.training import patients_in
from wardround.protection.privacy import Purse
from wardround.results.card import write_card
from wardround.results.files import read_result, read_rounds, write_result
from wardround.results.html import write_report
from wardround.results.schema import Measured, Result, RoundLine, Seconds, Traffic
from wardround.runner.alone import train_alone
from wardround.runner.arms import FEDERATED, POOLED
from wardround.runner.blueprints import Blueprint
from wardround.runner.evaluation import measure, tables
from wardround.runner.folder import alone, claim, mixed, without_in
from wardround.runner.host import Host
from wardround.runner.notes import notes_of
from wardround.runner.privacy import statement
from wardround.runner.protocols import read_protocols
from wardround.runner.release import load_model, save_release, shared_sha256
from wardround.runner.remarks import remarks_on
from wardround.runner.rounds import RoundsFile
from wardround.runner.watching import Lines, Shielded, Watcher
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import SitesFile, load_sites
from wardround.wire.files import write_text
from wardround.wire.tensors import tensors_sha256

log = logging.getLogger(__name__)
EngineName = Literal["local", "workers"]
SPEC = "spec.json"


def run(
    study: Study | str | Path | Mapping[str, Any],
    sites: SitesFile | str | Path,
    out: str | Path,
    *,
    compare: Sequence[str] = (),
    overrides: Sequence[str] = (),
    engine: EngineName | None = None,
    processes: int | None = None,
    resume: bool = False,
    without: Sequence[str] = (),
    watcher: Watcher | None = None,
    quiet: bool = False,
    allow_code: bool = False,
) -> Result:
    """Train a study, compare it with training alone and on pooled data, and write the result files into `out`.

    `allow_code` lets the study name any code (`task.factory: package.module:callable`), not only the plug-ins that the
    sites file allows: for your own study on your own machine.

    A run that was stopped, by whatever, goes on where it was when the same call is made again; `resume` insists that
    there is something to go on with. A run whose data at a site changed since it began is refused; `without` names the
    sites to go on without, for good: the run records it, and its report says so. A line for each phase and round
    goes to stderr, unless the run is `quiet` or a `watcher` sees to that. Raises `StudyError`, `DataError`,
    `JournalError`, `NotEnoughSites`, and `Interrupted` after Ctrl-C.
    """
    shielded = _shielded(watcher, quiet)
    host = open_host(study, sites, out, compare, overrides, shielded, without, allow_code=allow_code)
    for remark in remarks_on(host.study, host.sites):
        log.warning("%s", remark)
    began = time.perf_counter()
    host.preflight(shielded.phase)
    try:
        with alone(host.out), closing(host):
            fingerprints = claim(host, resume=resume)
            host.open_stores()
            with _Carrier(host, engine, processes, shielded) as carrier:
                host.build_operators(shielded.phase, keep=carrier.parallel == 1)
                releases = _train(host, carrier, shielded)
                _release(host, carrier.engine, releases)
                measured = tables(host, measure(host, carrier.engine, shielded.phase))
            return _conclude(host, releases, measured, fingerprints, time.perf_counter() - began)
    except KeyboardInterrupt:
        raise Interrupted(STOPPED) from None
    except OSError as error:
        raise disk_error(error) from error


def evaluate(
    out: str | Path,
    sites: SitesFile | str | Path,
    *,
    engine: EngineName | None = None,
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
    """
    out = Path(out)
    before = read_result(out)
    shielded = _shielded(watcher, quiet)
    host = open_host(out / "study.yaml", sites, out, before.compare, (), shielded, allow_code=allow_code)
    if host.study_sha256 != before.study_sha256:
        raise StudyError("study.yaml in the run's folder is not the study of result.json; restore it")
    with alone(out), closing(host), _Carrier(host, engine, processes, shielded) as carrier:
        # A number of its own: sites answer a request that they know from their store, and here they must measure.
        again = secrets.token_hex(16)
        return tables(host, measure(host, carrier.engine, shielded.phase, again=again))


def _shielded(watcher: Watcher | None, quiet: bool) -> Shielded:
    return Shielded(watcher if watcher is not None or quiet else Lines())


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
) -> Host:
    """The host of a run: study and sites loaded, and fitting each other; without the sites that it goes on without."""
    if not isinstance(study, Study):
        study = load_study(study, overrides)
    elif overrides:
        study = load_study(study.model_dump(mode="json"), overrides)
    if not isinstance(sites, SitesFile):
        sites = load_sites(sites)
    if allow_code:
        sites = sites.with_code()
    gone = without_in(Path(out)).union(without)
    for name, site in study.sites.items():
        if not site.scans and name not in gone:
            sites.of(name)
    return Host(study, sites, Path(out), tuple(compare), None if watcher is None else watcher.step, gone)


class _Carrier:
    """The engine of a run, closed when the run ends however it ends."""

    def __init__(self, host: Host, name: EngineName | None, processes: int | None, watcher: Shielded) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = processes or max(1, cores // host.study.local.threads)
        if (name or ("workers" if count > 1 else "local")) == "local":
            self.engine: Engine = LocalEngine(host.find)
            self.parallel = 1
            return
        spec = host.out / "work" / SPEC
        write_text(spec, json.dumps(host.spec()))
        self.engine = WorkersEngine(count, "wardround.runner.host:site_finder", spec, watcher.step)
        self.parallel = count + 1

    def __enter__(self) -> _Carrier:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


def _train(host: Host, carrier: _Carrier, watcher: Shielded) -> dict[str, Release]:
    """Train all arms, several at once where there are several workers."""
    stop = threading.Event()
    watcher.arms(list(host.arms), host.study.schedule.rounds)
    blueprints = {name: host.blueprint(name) for name in host.arms}
    rounds = RoundsFile(host.out, list(host.arms))
    for blueprint in blueprints.values():
        rounds.put(_committed(host, blueprint))

    def train(name: str) -> Release | None:
        blueprint, plan = blueprints[name], host.plan(name)
        if blueprint.arm.inside(host.study):
            for number in range(1, plan.rounds + 1):
                watcher.round(train_alone(carrier.engine, blueprint, number))
                if stop.is_set():
                    raise Interrupted(STOPPED)
            return None
        with closing(Journal(host.out / "work" / "arms" / blueprint.arm.folder, blueprint.identity)) as journal:
            protocol = host.exchange(blueprint.arm, journal)
            coordinator = Coordinator(plan, blueprint.method, carrier.engine, journal, protocol)
            state = coordinator.start(lambda: host.initial(blueprint))
            for report in journal.reports()[-1:]:
                watcher.round(_by_importance(host, report))
            for _ in coordinator.rounds(state):
                # The new round, and the one before where it now has its validation.
                for report in rounds.put(journal.reports()[-2:]):
                    watcher.round(_by_importance(host, report))
                if stop.is_set():
                    raise Interrupted(STOPPED)
            return coordinator.release()

    with ThreadPoolExecutor(carrier.parallel) as pool:
        futures = {name: pool.submit(train, name) for name in host.arms}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            failed = next((f for f in done if f.exception() is not None), None)
            if failed is not None:
                failed.result()
        except KeyboardInterrupt:
            raise Interrupted(STOPPED) from None
        finally:
            if not all(f.done() and f.exception() is None for f in futures.values()):
                stop.set()
                for future in futures.values():
                    future.cancel()
                carrier.engine.close()
    trained = {name: future.result() for name, future in futures.items()}
    return {name: release for name, release in trained.items() if release is not None}


def _by_importance(host: Host, report: RoundReport) -> RoundReport:
    """A report whose validation begins with the task's first metric: a journal keeps them by their letters."""
    known = report.validation
    if known is None:
        return report
    names = [spec.name for spec in host.task.metrics if spec.name in known]
    return replace(report, validation={name: known[name] for name in names} | dict(known))


def _committed(host: Host, blueprint: Blueprint) -> list[RoundReport]:
    """The rounds of an arm that an earlier process committed."""
    folder = host.out / "work" / "arms" / blueprint.arm.folder
    if not folder.exists():
        return []
    with closing(Journal(folder, blueprint.identity)) as journal:
        return journal.reports()


def _release(host: Host, engine: Engine, releases: Mapping[str, Release]) -> None:
    for name, release in releases.items():
        blueprint = host.blueprint(name)
        save_release(host, blueprint, release)
        if not blueprint.policy.names("local"):
            continue
        call = Call(
            kind=RELEASE,
            study=blueprint.identity,
            round=release.number,
            sites=tuple(s for s in host.remaining(blueprint.arm.sites) if s != POOLED),
            layout=blueprint.metrics_layout,
            scales={},
            # Rounds that took the place of void ones come after the study's last.
            meta={"void": sorted(release.void)} if release.void else {},
        )
        for reply in engine.exchange(call.message(site) for site in call.sites):
            if "reason" in reply.header.meta:
                raise WardroundError(f"site {reply.header.site} could not save its part: {reply.header.meta['reason']}")


def _conclude(
    host: Host,
    releases: Mapping[str, Release],
    measured: Measured,
    fingerprints: Sequence[Mapping[str, str]],
    seconds: float,
) -> Result:
    out = host.out
    lines = read_rounds(out)
    federated = [line for line in lines if line.arm == FEDERATED]
    rules = host.study.protection.privacy
    # With privacy a step has as many patients as were drawn: what is expected, at most.
    batch = host.study.local.batch if rules is None else round(rules.patients_per_step * rules.examples_per_patient)
    local_sha256 = {
        path.parent.parent.name: tensors_sha256(load_file(path))
        for path in sorted(out.glob(f"models/*/{FEDERATED}/local.safetensors"))
    }
    model = out / "models" / f"{FEDERATED}.safetensors"
    trained_on = read_protocols(load_model(model)[1], host.study)
    result = Result(
        **dict(measured),
        study=host.study.name,
        study_sha256=host.study_sha256,
        model_sha256=shared_sha256(model),
        local_sha256=local_sha256,
        scanners=trained_on.headers,
        rounds=host.study.schedule.rounds,
        participants=tuple(sorted({site for line in federated for site in line.participants})),
        compare=tuple(sorted({name.partition("/")[0] for name in host.arms} - {FEDERATED, "without"})),
        patients={site: _told(host, site) for site in host.study.sites},
        traffic=Traffic(
            bytes_up=sum(line.bytes_up for line in federated), bytes_down=sum(line.bytes_down for line in federated)
        ),
        seconds=Seconds(
            total=round(seconds, 3),
            training=round(sum(line.training_seconds for line in lines), 3),
            overhead=round(sum(line.coordinator_seconds for line in lines), 3),
        ),
        privacy=statement(host.study, host.study_sha256, _purses(host)),
        steps={name: arm.local.steps * host.study.schedule.rounds for name, arm in host.arms.items()},
        examples={
            name: arm.local.steps * batch * host.study.schedule.rounds * len(arm.sites)
            for name, arm in host.arms.items()
        },
        selected_round={name: release.number for name, release in releases.items()},
        fingerprint=fingerprints[-1],
        notes=(*_gone_without(host, lines), *mixed(fingerprints), *notes_of(lines)),
    )
    result = write_result(out, result)
    write_card(out)
    write_report(out)
    return result


def _patients(host: Host, site: str) -> dict[str, int] | None:
    """A site's patients by split; nothing where its data cannot be used, which the run has survived."""
    try:
        return patients_in(host.dataset(site))
    except Exception as error:
        log.warning("the data of site %s cannot be counted: %s", site, describe_error(error))
        return None


def _told(host: Host, site: str) -> Mapping[str, int | None] | None:
    """As many of them as the site's rules let out."""
    patients = None if site in host.without else _patients(host, site)
    return None if patients is None else host.egress(site).counts(patients)


def _purses(host: Host) -> Iterator[tuple[str, Purse]]:
    for site in host.study.training_sites if host.purses.rules is not None else ():
        if _patients(host, site) is not None:
            yield site, host.purses.of(site, host.dataset(site))


def _gone_without(host: Host, lines: Sequence[RoundLine]) -> Iterator[str]:
    """What to say of the sites that the run went on without, and of the arms that ended with them."""
    for site in sorted(host.without):
        took_part = [line.round for line in lines if line.arm == FEDERATED and site in line.participants]
        last = f"it took part up to round {max(took_part)}" if took_part else "it took part in no round"
        yield f"the run was resumed without {site} (--without): {last}, and is in no number and no mean of the results"
    if ended := [name for name in host.asked if name not in host.arms]:
        yield f"without {', '.join(sorted(host.without))} there are no results of {', '.join(ended)}"

"""The coordinator's part of a run: trains every arm, releases, measures, reports. It opens nothing of a site."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from wardround.engines.local import STOPPED
from wardround.errors import Interrupted, StudyError
from wardround.federation.asking import IMPATIENT, Patience
from wardround.federation.asynchronous import coordinator_of
from wardround.federation.coordinator import Release
from wardround.federation.exchange import Engine
from wardround.federation.facts import SiteFacts, SiteSpending
from wardround.federation.plans import staleness_of
from wardround.federation.release import (
    CARD,
    model_path,
    open_model,
    save_beside,
    save_frozen_part,
    save_release,
    scanners_of_arm,
    shared_sha256,
)
from wardround.plan.arm_specs import ArmSpec
from wardround.plan.arms import FEDERATED, POOLED
from wardround.plan.versions import placed
from wardround.results.card import write_card
from wardround.results.files import read_rounds, write_result
from wardround.results.html import write_report
from wardround.results.schema import Measured, Result, RoundLine, Seconds, Started
from wardround.results.shift import SHIFT_FILE, write_shift
from wardround.runs.alone import train_alone
from wardround.runs.asking import agree_on_roster, ask_facts, ask_release, ask_spending, deliver, deliveries
from wardround.runs.bills import Bills
from wardround.runs.context import Context
from wardround.runs.folder import add_devices, alone, claim, mixed, without_in
from wardround.runs.grouped import measured
from wardround.runs.notes import left_out, notes_of
from wardround.runs.protocols import read_protocols
from wardround.runs.remarks import remarks_on_given, remarks_on_missing
from wardround.runs.rounds import RoundsFile
from wardround.runs.shift import ask_shift
from wardround.runs.statement import statement
from wardround.runs.watching import Lines, Shielded, Watcher
from wardround.storage.blobs import disk_error
from wardround.storage.journal import Journal, RoundReport
from wardround.study.plugins import Plugins
from wardround.study.schema import Study

log = logging.getLogger(__name__)


def coordinate(
    study: Study,
    out: str | Path,
    engine: Engine,
    *,
    compare: Sequence[str] = (),
    resume: bool = False,
    without: Sequence[str] = (),
    watcher: Watcher | None = None,
    quiet: bool = False,
    plugins: Collection[str] = (),
    allow_code: bool = False,
    near: str | Path | None = None,
    patience: Patience = IMPATIENT,
) -> Result:
    """The coordinator's part of a run whose sites live elsewhere, where `engine` reaches them; the rest is as in `run`.

    `plugins` are names of installed entry points that the coordinator lets a study name; `start.file` of the study is
    relative to `near`, without one to the working folder. `patience` is with rounds that too few sites answer.

    Raises `StudyError` for what needs the patients of several sites in one place, and everything that `run` raises.
    """
    if POOLED in compare:
        raise StudyError("--compare pooled: needs the data of all sites in one place, and these stay apart")
    if scanning := next((name for name, site in study.sites.items() if site.scans), None):
        raise StudyError(f"sites.{scanning}.scans: needs patients of other sites in one place, and these stay apart")
    began, out, watching = time.perf_counter(), Path(out), shielded(watcher, quiet)
    allowed = Plugins({"coordinator": frozenset(plugins)}, allow_code)
    places = study.places(Path(near or ""))
    context = Context(study, out, compare, without_in(out).union(without), allowed, places=places)
    # The folder of the run is made later, when nothing is wrong with the study.
    context.aside = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    context.trains = False
    for name in context.arms:
        context.arm_spec(name)
    with stoppable(), alone(out):
        fingerprints = claim(context, resume=resume)
        return conduct(context, engine, len(context.arms), watching, fingerprints, began, patience)


@contextmanager
def stoppable() -> Iterator[None]:
    """What ends a run from outside, as errors of Wardround's own: Ctrl-C, and a disk that refuses."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(STOPPED) from None
    except OSError as error:
        raise disk_error(error) from error


def _train(
    host: Context,
    engine: Engine,
    beside: Engine,
    parallel: int,
    watcher: Shielded,
    facts: Mapping[str, SiteFacts],
    patience: Patience,
) -> dict[str, Release]:
    """Train all arms, several at once where there are several workers; `beside` carries what is in no round."""
    stop = threading.Event()
    if host.study.trains:
        watcher.arms(list(host.arms), host.study.schedule.rounds)
    arm_specs = {name: host.arm_spec(name) for name in host.arms}
    rounds = RoundsFile(host.out, list(host.arms))
    for arm_spec in arm_specs.values():
        rounds.put(_committed(host, arm_spec))

    def train(name: str) -> Release | None:
        arm_spec, plan = arm_specs[name], host.plan(name)
        if arm_spec.arm.inside(host.study):
            for number in range(1, plan.rounds + 1):
                watcher.round(train_alone(beside, arm_spec, number))
                if stop.is_set():
                    raise Interrupted(STOPPED)
            return None
        with closing(Journal(host.out / "work" / "arms" / arm_spec.arm.folder, arm_spec.identity)) as journal:
            roster = agree_on_roster(host, beside, arm_spec.arm, facts)
            protocol = host.exchange(arm_spec.arm, journal, roster)
            coordinator = coordinator_of(plan, arm_spec.method, engine, journal, protocol, patience)
            # The new round, and the one before where it now has its validation; further back where rounds are not in
            # step.
            recent = 2 if plan.staleness is None else 2 + plan.staleness.most
            state = coordinator.start(lambda: host.initial(arm_spec))
            host.model_context.rest()
            for report in journal.reports()[-1:]:
                watcher.round(_by_importance(host, report))
            for _ in coordinator.rounds(state):
                for report in rounds.put(journal.reports()[-recent:]):
                    watcher.round(_by_importance(host, report))
                if stop.is_set():
                    raise Interrupted(STOPPED)
            return coordinator.release()

    with ThreadPoolExecutor(parallel) as pool:
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
                engine.close()
    trained = {name: future.result() for name, future in futures.items()}
    return {name: release for name, release in trained.items() if release is not None}


def _by_importance(host: Context, report: RoundReport) -> RoundReport:
    """A report whose validation begins with the task's first metric: a journal keeps them by their letters."""
    known = report.validation
    if known is None:
        return report
    names = [spec.name for spec in host.task.metrics if spec.name in known]
    return replace(report, validation={name: known[name] for name in names} | dict(known))


def _committed(host: Context, arm_spec: ArmSpec) -> list[RoundReport]:
    """The rounds of an arm that an earlier process committed."""
    folder = host.out / "work" / "arms" / arm_spec.arm.folder
    if not folder.exists():
        return []
    with closing(Journal(folder, arm_spec.identity)) as journal:
        return journal.reports()


def _release(
    host: Context, engine: Engine, releases: Mapping[str, Release], facts: Mapping[str, SiteFacts]
) -> dict[str, str]:
    """Save what the arms release; the hashes of the sites' private parts of the federation's model."""
    private: dict[str, str] = {}
    save_frozen_part(host, host.out)
    headers = {site: said.headers for site, said in facts.items() if site not in host.without}
    for name, release in releases.items():
        arm_spec = host.arm_spec(name)
        scanners = scanners_of_arm(host, arm_spec.arm, headers)
        save_release(host, arm_spec, release, scanners, model_path(host.out, arm_spec.arm.folder))
        found = ask_release(host, engine, arm_spec, release.number, release.aborted)
        if name == FEDERATED:
            private = found
            save_beside(host, arm_spec, release, model_path(host.out, arm_spec.arm.folder).parent)
    return private


def conduct(
    host: Context,
    engine: Engine,
    parallel: int,
    watcher: Shielded,
    fingerprints: Sequence[Mapping[str, str]],
    began: float,
    patience: Patience = IMPATIENT,
) -> Result:
    """The coordinator's part of a run, from the first question to the sites to the report.

    `parallel` arms train at once. `patience` is with rounds that too few sites answer. Opens nothing of a site: all
    that it knows of one came in messages.
    """
    bills = Bills(host)
    beside = bills.counting(engine)
    facts = ask_facts(host, beside)
    machines = {site: facts[site].machine for site in host.remaining(host.study.sites) if site in facts}
    fingerprints = add_devices(host.out, fingerprints, placed(machines))
    if host.study.site_statistics and not (host.out / SHIFT_FILE).exists():
        write_shift(host.out, ask_shift(host, beside))
    releases = _train(host, engine, beside, parallel, watcher, facts, patience)
    private = _release(host, beside, releases, facts)
    numbers = measured(host, beside, watcher.phase)
    took_part = {site for line in read_rounds(host.out) for site in line.participants}
    spendings = ask_spending(host, beside, facts, took_part)
    seconds = time.perf_counter() - began
    result = _conclude(host, bills, releases, numbers, fingerprints, seconds, facts, private, spendings)
    write_card(host.out)
    messages = deliveries(host, model_path(host.out, FEDERATED), host.out / CARD)
    # Before they are sent: a result does not wait for the slowest site.
    bills.add(messages)
    result = write_result(host.out, result.model_copy(update={"traffic": bills.traffic()}))
    write_report(host.out)
    for site, why in deliver(engine, messages).items():
        log.warning("site %s did not get the released model: %s. The same command sends it again", site, why)
    return result


def _conclude(
    host: Context,
    bills: Bills,
    releases: Mapping[str, Release],
    numbers: Measured,
    fingerprints: Sequence[Mapping[str, str]],
    seconds: float,
    facts: Mapping[str, SiteFacts],
    private: Mapping[str, str],
    spendings: Mapping[str, SiteSpending],
) -> Result:
    out = host.out
    lines = read_rounds(out)
    federated = [line for line in lines if line.arm == FEDERATED]
    rules = host.study.protection.privacy
    # With privacy a step has as many patients as were drawn: what is expected, at most.
    batch = host.study.local.batch if rules is None else round(rules.patients_per_step * rules.examples_per_patient)
    model = out / "models" / f"{FEDERATED}.safetensors"
    trained_on = read_protocols(open_model(model)[1], host.study)
    result = Result(
        **dict(numbers),
        study=host.study.name,
        study_sha256=host.study_sha256,
        plan_sha256=host.plan_sha256,
        model_sha256=shared_sha256(model),
        local_sha256=dict(private),
        start=Started(kind=host.study.start.kind, sha256=getattr(host.study.start, "sha256", None)),
        frozen_sha256=host.frozen_sha256,
        # Those of a given model are of whichever sites it learned at.
        scanners=trained_on.headers if host.study.trains else {},
        rounds=host.study.schedule.rounds,
        participants=tuple(sorted({site for line in federated for site in line.participants})),
        compare=tuple(sorted({name.partition("/")[0] for name in host.arms} - {FEDERATED, "without"})),
        patients={site: _patients(host, site, facts) for site in host.study.sites},
        set_aside={site: facts[site].set_aside for site in host.study.sites if _patients(host, site, facts)},
        traffic=bills.traffic(),
        seconds=Seconds(
            total=round(seconds, 3),
            training=round(sum(line.training_seconds for line in lines), 3),
            overhead=round(sum(line.coordinator_seconds for line in lines), 3),
        ),
        privacy=statement(host.study, spendings),
        steps={
            name: host.arm_spec(name).steps * host.study.schedule.rounds
            for name, arm in host.arms.items()
            if arm.local.passes is None
        },
        examples={
            name: host.arm_spec(name).steps * batch * _updates(host, name, lines)
            for name, arm in host.arms.items()
            if arm.local.passes is None
        },
        selected_round={name: release.number for name, release in releases.items()},
        fingerprint=fingerprints[-1],
        notes=(
            *_gone_without(host, lines),
            *left_out(federated, _training(host, facts)),
            *mixed(fingerprints),
            *notes_of(lines),
            *(f"{remark}." for remark in remarks_on_missing(host.study)),
            *remarks_on_given(host.study, host.places),
        ),
    )
    return write_result(out, result)


def _updates(host: Context, name: str, lines: Sequence[RoundLine]) -> int:
    """How many updates an arm's rounds have: as many as the study says, or as came where they wait for no site."""
    arm = host.arms[name]
    if staleness_of(host.study, arm) is None:
        return host.study.schedule.rounds * len(arm.sites)
    return sum(len(line.participants) for line in lines if line.arm == name)


def _patients(host: Context, site: str, facts: Mapping[str, SiteFacts]) -> dict[str, int | None] | None:
    """A site's patients by split, as it gives them; nothing where it gave none, which the run has survived."""
    said = None if site in host.without or site not in facts else facts[site].patients
    return None if said is None else said.model_dump()


def _training(host: Context, facts: Mapping[str, SiteFacts]) -> dict[str, int | None]:
    """The numbers of patients that the sites of the federation train on; nothing where a site gave none."""
    found = {site: _patients(host, site, facts) for site in host.remaining(host.arms[FEDERATED].sites)}
    return {site: None if patients is None else patients["train"] for site, patients in found.items()}


def _gone_without(host: Context, lines: Sequence[RoundLine]) -> Iterator[str]:
    """What to say of the sites that the run went on without, and of the arms that ended with them."""
    for site in sorted(host.without):
        took_part = [line.round for line in lines if line.arm == FEDERATED and site in line.participants]
        last = f"it took part up to round {max(took_part)}" if took_part else "it took part in no round"
        yield f"the run was resumed without {site} (--without): {last}, and is in no number and no mean of the results"
    if ended := [name for name in host.asked if name not in host.arms]:
        yield f"without {', '.join(sorted(host.without))} there are no results of {', '.join(ended)}"


def shielded(watcher: Watcher | None, quiet: bool) -> Shielded:
    """What watches a run: the one given, or lines on stderr unless the run is quiet."""
    return Shielded(watcher if watcher is not None or quiet else Lines())

"""Writes report.html: one file, readable without JavaScript and without a network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from wardround.results import figures, views
from wardround.results.answer import answer, arm_words, unseen_result
from wardround.results.bill import bill_of
from wardround.results.classes import class_charts
from wardround.results.cost import crossings, matrix_table
from wardround.results.groups import grouped_columns
from wardround.results.paired import paired_charts
from wardround.results.pictures import ERROR_GAIN, gallery
from wardround.results.run import SMALL_N, Run, load_run
from wardround.results.schema import Seconds
from wardround.results.units import human_bytes, human_seconds, in_rounds, protocol, protocol_note
from wardround.tasks.estimates import LEAST_PATIENTS
from wardround.wire.files import write_text


@dataclass(frozen=True)
class Fact:
    """A key figure with what it means."""

    name: str
    value: str
    note: str = ""
    style: str = ""


def write_report(out: Path) -> Path:
    """Writes `out/report.html` from the result files in `out` and returns its path.

    Raises `JournalError` where `result.json` is missing or a result file is damaged, `StudyError` for the study file.
    """
    page = render(load_run(out))
    path = out / "report.html"
    write_text(path, page)  # a reader never finds half a report
    return path


def render(run: Run) -> str:
    """The page of a run."""
    metrics = run.result.measured
    metric = metrics[0] if metrics else None
    return template("pictures.html", "heat.html", "template.html").render(
        css=Markup(resource("style.css")),  # ours, not a result's
        run=run,
        model="shared model" if run.trained else "given model",
        description=run.study.description,
        answer=answer(run),
        facts=_facts(run),
        warnings=views.warnings(run),
        metric=metric,
        metrics=metrics,
        comparisons=[(each, views.comparison(run, each)) for each in metrics],
        gains=views.gains_over_alone(run, metric) if metric else None,
        left_out=views.gains_at_left_out(run, metric) if metric else None,
        crossings=[(each, matrix_table(each)) for each in crossings(run.result)],
        gate=views.gate_tables(run),
        groups=grouped_columns(run),
        paired=paired_charts(run, metric) if metric else (),
        mark=figures.mark,
        gallery=gallery(run),
        class_charts=class_charts(run),
        error_gain=ERROR_GAIN,
        curves=views.learning_curves(run, metric),
        curve_height=figures.PLOT,
        attendance=views.attendance(run),
        absences=views.absences(run),
        rounds=_rounds_sentence(run),
        traffic=_traffic(run),
        bill=bill_of(run.result),
        seconds=_seconds(run),
        privacy=run.spent,
        scanner=run.scanner,
        protocol_note=protocol_note,
        protocols=_protocols(run),
        hashes=run.hashes,
        fingerprint=tuple(run.result.fingerprint.items()),
        training=_training(run),
        small_n=SMALL_N,
        least_n=LEAST_PATIENTS,
    )


@cache
def template(*names: str) -> Template:
    """The template that these files are, one behind the other: the macros of the first are known in the last."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string("".join(resource(name) for name in names))


def resource(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("wardround.results").joinpath(name).read_text(encoding="utf-8")


def _facts(run: Run) -> tuple[Fact, ...]:
    if not run.result.measured:
        return ()
    metric, together = run.result.measured[0], run.arm("federated")
    found = []
    for arm in (run.arm("local"), together, run.arm("pooled")):
        estimate = run.result.estimate(arm.key, "mean", metric.name) if arm else None
        if arm is not None and estimate is not None:
            of = "mean of training sites" if run.trained else "mean of sites"
            found.append(Fact(arm.label, metric.amount(estimate.value), of, arm.style))
    unseen = unseen_result(run, metric, together.key) if together and run.trained else None
    if unseen is not None:
        found.append(Fact("Unseen", metric.amount(unseen.value), unseen.where, "federated"))
    return tuple(found)


def _rounds_sentence(run: Run) -> str:
    history = run.federated_history
    if not history:
        return "The run left no record of its rounds."
    full = sum(set(run.training) <= set(entry.participants) for entry in history)
    repeated = sorted(entry.round for entry in history if entry.attempt > 0)
    text = f"{len(run.training)} training sites, {len(history)} rounds; all sites took part in {full} of them."
    if ages := [age for entry in history for age in entry.staleness.values()]:
        late = [age for age in ages if age]
        text += f" Rounds did not wait for slow sites: {len(late)} of {len(ages)} updates came late"
        text += f", by {max(late)} round{'s' if max(late) > 1 else ''} at most." if late else "."
    return text + (f" More than one attempt was needed in {in_rounds(repeated)}." if repeated else "")


def _traffic(run: Run) -> tuple[Fact, ...]:
    if not run.trained:
        tests = run.result.traffic.arms["federated"].tests
        return (
            Fact("From the sites", human_bytes(tests.up.total), "results of tests, no images"),
            Fact("To the sites", human_bytes(tests.down.total), "the given model, to be measured"),
        )
    visits, traffic = sum(len(entry.participants) for entry in run.federated_history), run.result.traffic
    return tuple(
        Fact(name, human_bytes(total), (f"{human_bytes(total / visits)} per round and site; " if visits else "") + note)
        for name, total, note in (
            ("From the sites", traffic.bytes_up, "updates: sums of what was learned, no images"),
            ("To the sites", traffic.bytes_down, "the shared model, round by round"),
        )
    )


def _seconds(run: Run) -> tuple[Fact, ...]:
    return tuple(
        Fact(key.capitalize(), human_seconds(value), Seconds.model_fields[key].description or "")
        for key, value in run.result.seconds
    )


def _protocols(run: Run) -> tuple[tuple[str, str, str], ...]:
    return tuple((site, run.role(site), protocol(run.acquisition(site)) or "–") for site in run.sites)


def _training(run: Run) -> tuple[tuple[str, str, str], ...]:
    """(arm, optimiser steps, released round) of every arm that trained."""
    if not run.trained:
        return ()
    steps, released = run.result.steps, run.result.selected_round
    return tuple(
        (
            arm_words(run, arm),
            f"{steps[arm]:,}" if arm in steps else "by passes",
            f"{released[arm]:,}" if arm in released else "–",
        )
        for arm in dict.fromkeys((*steps, *released))
    )

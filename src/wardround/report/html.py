"""Writes report.html: one file, readable without JavaScript and without a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from wardround.report import figures, views
from wardround.report.answer import answer, arm_words, unseen_result
from wardround.report.pictures import ERROR_GAIN, gallery
from wardround.report.results import LEAST_N, SMALL_N, Run, load_run
from wardround.report.units import flat, human_bytes, human_seconds, in_rounds, protocol
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

    Raises `JournalError` where `result.json` is missing or a result file is damaged.
    """
    page = render(load_run(out))
    path = out / "report.html"
    write_text(path, page)  # a reader never finds half a report
    return path


def render(run: Run) -> str:
    """The page of a run."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    metric = run.metrics[0] if run.metrics else None
    template = environment.from_string(_resource("template.html"))
    return template.render(
        css=Markup(_resource("style.css")),  # ours, not a result's
        run=run,
        description=str(run.study.get("description") or ""),
        answer=answer(run),
        facts=_facts(run),
        warnings=views.warnings(run),
        metric=metric,
        metrics=run.metrics,
        comparisons=[views.comparison(run, each) for each in run.metrics],
        gains=views.gains_over_alone(run, metric) if metric else None,
        left_out=views.gains_at_left_out(run, metric) if metric else None,
        mark=figures.mark,
        gallery=gallery(run),
        error_gain=ERROR_GAIN,
        curves=views.learning_curves(run, metric),
        curve_height=figures.PLOT,
        attendance=views.attendance(run),
        absences=views.absences(run),
        rounds=_rounds_sentence(run),
        traffic=_traffic(run),
        seconds=_seconds(run),
        privacy=tuple(flat(run.privacy)),
        simulated=run.simulated,
        protocols=_protocols(run),
        hashes=_hashes(run),
        fingerprint=tuple(flat(run.result.get("fingerprint") or {})),
        training=_training(run),
        small_n=SMALL_N,
        least_n=LEAST_N,
    )


def _resource(name: str) -> str:
    return resources.files("wardround.report").joinpath(name).read_text(encoding="utf-8")


def _mapping(run: Run, key: str) -> Mapping[str, Any]:
    value = run.result.get(key)
    return value if isinstance(value, Mapping) else {}


def _facts(run: Run) -> tuple[Fact, ...]:
    if not run.metrics:
        return ()
    metric, together = run.metrics[0], run.arm("federated")
    found = []
    for arm in (run.arm("local"), together, run.arm("pooled")):
        estimate = run.estimate(arm.key, "mean", metric.name) if arm else None
        if arm is not None and estimate is not None:
            found.append(Fact(arm.label, metric.amount(estimate.value), "mean of training sites", arm.style))
    unseen = unseen_result(run, metric, together.key) if together else None
    if unseen is not None:
        found.append(Fact("Unseen", metric.amount(unseen.value), unseen.where, "federated"))
    return tuple(found)


def _rounds_sentence(run: Run) -> str:
    together = run.arm("federated")
    history = run.history(together.key if together else "federated")
    if not history:
        return "The run left no record of its rounds."
    full = sum(set(run.training) <= set(entry.participants) for entry in history)
    repeated = sorted(entry.number for entry in history if entry.attempt > 0)
    text = f"{len(run.training)} training sites, {len(history)} rounds; all sites took part in {full} of them."
    return text + (f" More than one attempt was needed in {in_rounds(repeated)}." if repeated else "")


def _traffic(run: Run) -> tuple[Fact, ...]:
    together = run.arm("federated")
    history = run.history(together.key if together else "federated")
    visits = sum(len(entry.participants) for entry in history)
    visits = visits or len(run.training) * int(run.result.get("rounds") or 0)
    facts = []
    for key, name, note in (
        ("bytes_up", "From the sites", "updates: sums of what was learned, no images"),
        ("bytes_down", "To the sites", "the shared model, round by round"),
    ):
        total = _mapping(run, "traffic").get(key)
        if isinstance(total, int | float):
            each = f"{human_bytes(total / visits)} per round and site; " if visits else ""
            facts.append(Fact(name, human_bytes(total), each + note))
    return tuple(facts)


def _seconds(run: Run) -> tuple[Fact, ...]:
    notes = {
        "total": "the whole run, all arms",
        "training": "of which training at the sites",
        "overhead": "of which moving, checking and adding updates",
    }
    found = _mapping(run, "seconds")
    return tuple(
        Fact(key.capitalize(), human_seconds(float(value)), notes.get(key, ""))
        for key, value in found.items()
        if isinstance(value, int | float)
    )


def _protocols(run: Run) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (site, "trains" if site in run.training else "evaluated only", protocol(run.acquisition(site)) or "–")
        for site in run.sites
    )


def _hashes(run: Run) -> tuple[tuple[str, str], ...]:
    found = [
        ("study_sha256", run.result.get("study_sha256")),
        ("model_sha256", run.result.get("model_sha256")),
    ]
    found += list(flat(_mapping(run, "local_sha256"), "local_sha256"))
    return tuple((name, str(value)) for name, value in found if value)


def _training(run: Run) -> tuple[tuple[str, str, str], ...]:
    """(arm, optimiser steps, released round) of every arm that trained."""
    steps, released = _mapping(run, "steps"), _mapping(run, "selected_round")
    keys = dict.fromkeys([*steps, *released])
    return tuple((arm_words(run, key), _text(steps.get(key)), _text(released.get(key))) for key in keys)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)

"""Writes model_card.md: what the released model is, what it was tested on, and what it is not for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from wardround.report.answer import answer
from wardround.report.metrics import Metric
from wardround.report.results import AGGREGATES, LEAST_N, SMALL_N, Run, load_run, site_title
from wardround.report.units import flat, human_bytes, human_seconds, protocol
from wardround.report.unmeasured import unmeasured
from wardround.report.views import warnings
from wardround.study.protocols import HeaderFacts
from wardround.wire.files import write_text


def write_card(out: Path) -> Path:
    """Writes `out/model_card.md` from the result files in `out` and returns its path.

    Raises `JournalError` where `result.json` is missing or a result file is damaged.
    """
    path = out / "model_card.md"
    write_text(path, card(load_run(out)))
    return path


def escape(text: object) -> str:
    """Text as one line of Markdown that holds no markup of its own."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!])", r"\\\1", line)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _bullets(lines: Iterable[object]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def card(run: Run) -> str:
    """The Markdown of a run's model card."""
    found = answer(run)
    parts = [
        f"# Model card: {escape(run.name)}",
        "**Research use only. Not a medical device: not for diagnosis or treatment.**",
        escape(run.study.get("description") or ""),
        escape(found.headline),
        _bullets(found.details),
        "## Intended use",
        _bullets(_intended(run)),
        "## Data",
        _data(run),
        "## Results on test patients",
        *(_metric(run, metric) for metric in run.metrics),
        "Means over test patients with 95% intervals (Student's t) from the standard errors that sites computed; "
        f"the mean gives every training site the same weight. Fewer than {LEAST_N} patients have no interval. "
        f"Where n is below {SMALL_N}, a single patient can decide the outcome.",
        "## Training",
        _bullets(_training(run)),
        "## Limits",
        _bullets(_limits(run)),
        "## Reproducibility",
        _table(["what", "value"], _identity(run)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _intended(run: Run) -> list[str]:
    purpose = {
        "mri": "Research on reconstruction from undersampled raw data of the protocols below.",
        "ct": "Research on reconstruction from projections of the protocols below.",
    }.get(run.simulated or "", "Research on the task described by the study file.")
    return [
        purpose,
        "Not for clinical decisions, and not for anatomy, scanners or protocols that are not listed below.",
        "Test it on your own data before you rely on it for anything.",
    ]


def _data(run: Run) -> str:
    simulated = run.simulated is not None
    rows = []
    for site in run.sites:
        patients = run.patients(site)
        row = [site, "trains" if site in run.training else "evaluated only"]
        row.append("withheld or unknown" if patients is None else str(patients))
        rows.append([*row, protocol(run.acquisition(site)) or "–"] if simulated else row)
    head = ("site", "role", "test patients", *(("simulated protocol",) if simulated else ()))
    table = _table(head, rows)
    told = {site: HeaderFacts.model_validate(facts).text for site, facts in (run.result.get("scanners") or {}).items()}
    if told:
        table += "\n\nThe scanners that took the images, as the headers of training images name them:\n\n" + _table(
            ["site", "scanners, tube voltage, slice thickness, kernel"], told.items()
        )
    if not simulated:
        return table
    return table + "\n\nSimulated acquisitions, not raw data measured by a scanner."


def _metric(run: Run, metric: Metric) -> str:
    keys = [key for key in (*run.sites, *AGGREGATES) if key in run.sites or _any(run, key, metric)]
    unit = f" ({metric.unit})" if metric.unit else ""
    direction = "higher" if metric.larger_is_better else "lower"
    head = ["site", "n", *(escape(arm.label) for arm in run.arms)]
    rows = []
    for key in keys:
        patients = run.patients(key)
        cells = [_cell(run, metric, arm.key, key) for arm in run.arms]
        rows.append([site_title(key), "–" if patients is None else str(patients), *cells])
    return f"### {escape(metric.label)}{unit}, {direction} is better\n\n{_table(head, rows)}"


def _any(run: Run, key: str, metric: Metric) -> bool:
    return any(run.estimate(arm.key, key, metric.name) for arm in run.arms)


def _cell(run: Run, metric: Metric, arm: str, key: str) -> str:
    estimate = run.estimate(arm, key, metric.name)
    if estimate is None:
        why = unmeasured(run, arm, key)
        return why.text if why else "–"
    ends = estimate.interval
    interval = f" ({metric.show(ends[0])} to {metric.show(ends[1])})" if ends else ""
    return metric.show(estimate.value) + interval


def _training(run: Run) -> list[str]:
    lines = [
        f"Sites that trained: {', '.join(run.training) or 'unknown'}",
        f"Rounds: {run.result.get('rounds', '–')}",
    ]
    # A task of one's own builds its own model: that of the study file is none of it.
    own = (run.study.get("task") or {}).get("kind") == "custom"
    for section in ("task" if own else "model", "method", "local", "schedule", "protection"):
        values = run.study.get(section) or {}
        # What a study leaves to the model's preset is not "none".
        shown = {key: value for key, value in values.items() if section != "model" or value is not None}
        settings = ", ".join(f"{key} {value}" for key, value in flat(shown))
        if settings:
            lines.append(f"{section.capitalize()}: {settings}")
    traffic, seconds = run.result.get("traffic") or {}, run.result.get("seconds") or {}
    if {"bytes_up", "bytes_down"} <= traffic.keys():
        up, down = human_bytes(traffic["bytes_up"]), human_bytes(traffic["bytes_down"])
        lines.append(f"Traffic: {up} from the sites, {down} to the sites")
    if "total" in seconds:
        lines.append(f"Time: {human_seconds(seconds['total'])}")
    spent = ", ".join(f"{key} {value}" for key, value in flat(run.privacy))
    lines.append(f"Differential privacy: {spent or 'none'}")
    if not spent:
        lines.append(f"Secure sum: {'yes' if run.secure else 'no'}")
    return lines


def _limits(run: Run) -> list[str]:
    return [
        *warnings(run),
        "Intervals hold the chance of which patients were tested, not that of another seed or hospital.",
        "Patients of the participating sites do not represent all patients; "
        "results by age, sex, field strength or disease are not measured here.",
    ]


def _identity(run: Run) -> list[tuple[str, str]]:
    rows = [(key, str(run.result[key])) for key in ("study_sha256", "model_sha256") if run.result.get(key)]
    rows += list(flat(run.result.get("local_sha256") or {}, "local_sha256"))
    rows += list(flat(run.result.get("fingerprint") or {}))
    return rows

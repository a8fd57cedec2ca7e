"""Writes model_card.md: what the released model is, what it was tested on, and what it is not for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from wardround.results.answer import answer
from wardround.results.groups import grouped_columns
from wardround.results.metrics import MetricInfo
from wardround.results.run import SMALL_N, Run, load_run
from wardround.results.schema import Part
from wardround.results.units import flat, human_bytes, human_seconds, protocol, protocol_head, protocol_note
from wardround.results.views import comparison, warnings
from wardround.study.tasks import ReconstructionTask
from wardround.tasks.estimates import LEAST_PATIENTS
from wardround.wire.files import write_text


def write_card(out: Path) -> Path:
    """Writes `out/model_card.md` from the result files in `out` and returns its path.

    Raises `JournalError` where `result.json` is missing or a result file is damaged, `StudyError` for the study file.
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
        f"# Model card: {escape(run.result.study)}",
        "**Research use only. Not a medical device: not for diagnosis or treatment.**",
        escape(run.study.description),
        escape(found.headline),
        _bullets(found.details),
        *_gate(run),
        "## Intended use",
        _bullets(_intended(run)),
        "## Data",
        _data(run),
        "## Results on test patients",
        *(_metric(run, metric) for metric in run.result.measured),
        "Means over test patients with 95% intervals (Student's t) from the standard errors that sites computed; "
        f"the mean gives every {'training site' if run.trained else 'site'} the same weight. Fewer than "
        f"{LEAST_PATIENTS} patients have no interval. "
        f"Where n is below {SMALL_N}, a single patient can decide the outcome.",
        *_groups(run),
        *(_part(part) for part in run.result.parts),
        "## Training",
        _bullets(_training(run)),
        "## Limits",
        _bullets(_limits(run)),
        "## Reproducibility",
        _table(["what", "value"], [*run.hashes, *run.result.fingerprint.items()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gate(run: Run) -> Iterator[str]:
    """Whether the model takes the place of the release that its study continues."""
    gate = run.result.gate
    if gate is None:
        return
    yield "## Release"
    verdict = "It takes the release's place" if gate.promoted else "NOT PROMOTED: the release stays in use"
    yield _bullets(
        [
            f"This model continues {run.study.start.describe()}.",
            f"{verdict}: {gate.reason}.",
        ]
    )


def _intended(run: Run) -> list[str]:
    scanner = run.scanner
    purpose = "Research on the task described by the study file." if scanner is None else scanner.purpose
    return [
        purpose,
        "Not for clinical decisions, and not for anatomy, scanners or protocols that are not listed below.",
        "Test it on your own data before you rely on it for anything.",
    ]


def _data(run: Run) -> str:
    scanner = run.scanner
    rows = []
    for site in run.sites:
        patients = run.patients(site)
        row = [site, run.role(site)]
        row.append("withheld or unknown" if patients is None else str(patients))
        rows.append([*row, protocol(run.acquisition(site)) or "–"] if scanner is not None else row)
    head = ("site", "role", "test patients", *(() if scanner is None else (protocol_head(scanner),)))
    table = _table(head, rows)
    if run.result.scanners:
        table += "\n\nThe scanners that took the images, as the headers of training images name them:\n\n" + _table(
            ["site", "scanners, tube voltage, slice thickness, kernel"],
            [(site, facts.text) for site, facts in run.result.scanners.items()],
        )
    return table if scanner is None else f"{table}\n\n{protocol_note(scanner)}"


def _metric(run: Run, metric: MetricInfo) -> str:
    rows = [
        [row.title, row.n, *(cell.text + (f" ({cell.interval})" if cell.interval else "") for cell in row.cells)]
        for row in comparison(run, metric)
    ]
    head = ["site", "n", *(escape(arm.label) for arm in run.arms_in(metric))]
    return f"### {escape(metric.heading)}, {metric.direction}\n\n{_table(head, rows)}"


def _groups(run: Run) -> Iterator[str]:
    """A table of each metric by each column that sites declare."""
    for column in grouped_columns(run):
        yield f"### By {escape(column.name)}"
        for table in column.tables:
            site, rows = "", []
            for row in table.rows:
                site = row.site if row.span else site
                cells = (cell.text + (f" ({cell.interval})" if cell.interval else "") for cell in row.cells)
                rows.append([site, row.group, row.n, *cells])
            head = ["site", escape(column.name), "n", *(escape(arm.label) for arm in table.arms)]
            yield f"{escape(table.metric.heading)}, {table.metric.direction}:\n\n{_table(head, rows)}"


def _part(part: Part) -> str:
    """What the task says of its results."""
    table = _table([escape(name) for name in part.head], part.cells) if part.head else ""
    return "\n\n".join(each for each in (f"## {escape(part.title)}", escape(part.text), table) if each)


def _training(run: Run) -> list[str]:
    if not run.trained:
        return _measured(run)
    result, study = run.result, run.study.model_dump(mode="json")
    lines = [f"Sites that trained: {', '.join(run.training)}", f"Rounds: {result.rounds}"]
    validated = f"Sites that did not train, and whose validation patients count: {', '.join(run.evaluating)}"
    # A task of one's own builds its own model: that of the study file is none of it.
    task = run.study.task
    own = () if isinstance(task, ReconstructionTask) else ("task",)
    for section in (*own, *(("model",) if task.network else ()), "method", "local", "schedule", "protection"):
        # What a study leaves to the model's preset is not "none".
        shown = {key: value for key, value in study[section].items() if section != "model" or value is not None}
        lines.append(f"{section.capitalize()}: {', '.join(f'{key} {value}' for key, value in flat(shown))}")
    lines.insert(2, f"Started from: {run.study.start.describe()}")
    if (teacher := task.taught_by) is not None:
        lines.insert(3, f"Taught by: {teacher.describe()}")
    if frozen := study["parts"]["frozen"]:
        lines.insert(3, f"Never trained: {', '.join(frozen)}, stored in weights/{run.result.frozen_sha256}.safetensors")
    if adapters := run.study.adapters.describe():
        lines.insert(3, f"Trained beside frozen layers: {adapters}")
    if run.evaluating:
        lines.insert(1, validated)
    up, down = human_bytes(result.traffic.bytes_up), human_bytes(result.traffic.bytes_down)
    lines.append(f"Traffic: {up} from the sites, {down} to the sites")
    lines.append(f"Time: {human_seconds(result.seconds.total)}")
    spent = ", ".join(f"{key} {value}" for key, value in run.spent)
    lines.append(f"Differential privacy: {spent or 'none'}")
    if not spent:
        lines.append(f"Secure sum: {'yes' if run.secure else 'no'}")
    return lines


def _measured(run: Run) -> list[str]:
    """What there is to say of a model that a study was given and that it only measured."""
    tests = run.result.traffic.arms["federated"].tests
    lines = [
        "Nothing was trained in this study: it measured a model that it was given",
        f"Measured: {run.study.start.describe()}",
        f"Measured at: {', '.join(run.sites)}",
    ]
    if adapters := run.study.adapters.describe():
        lines.append(f"Beside frozen layers: {adapters}")
    lines.append(f"Traffic: {human_bytes(tests.up.total)} from the sites, {human_bytes(tests.down.total)} to the sites")
    lines.append(f"Time: {human_seconds(run.result.seconds.total)}")
    return lines


def _limits(run: Run) -> list[str]:
    columns = ", ".join(dict.fromkeys(groups.column for groups in run.result.groups))
    others = f"anything but {columns}" if columns else "age, sex, field strength or disease"
    return [
        *warnings(run),
        *(f"Not given by group at {site}: {why}." for site, why in run.result.groups_missing.items()),
        "Intervals hold the chance of which patients were tested, not that of another seed or hospital.",
        f"Patients of the participating sites do not represent all patients; results by {others} are not measured "
        "here.",
    ]

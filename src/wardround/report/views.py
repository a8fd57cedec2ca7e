"""What the page shows, as plain values: a run's numbers turned into rows, charts and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from markupsafe import Markup

from wardround.report import figures
from wardround.report.answer import Gain, left_out_gains, mean_gain, site_gains, verdict_of
from wardround.report.figures import Curve, Curves
from wardround.report.metrics import Metric
from wardround.report.patients import Points, points_of
from wardround.report.results import (
    AGGREGATES,
    LEAST_N,
    SATURATION_LIMIT,
    SMALL_N,
    Arm,
    Estimate,
    Round,
    Run,
    site_title,
)
from wardround.report.units import in_rounds, protocol, ranges
from wardround.report.unmeasured import FAILED, WITHHELD, Unmeasured, unmeasured

SITE_COLOURS = 8


@dataclass(frozen=True)
class Lane:
    """One arm's row in a site's chart."""

    arm: Arm
    svg: Markup
    text: str


@dataclass(frozen=True)
class SiteChart:
    """One site's dot chart."""

    title: str
    note: str
    small: bool
    aggregate: bool
    lanes: tuple[Lane, ...]
    axis: Markup
    missing: Unmeasured | None


@dataclass(frozen=True)
class Cell:
    """Value and interval, or why there is none; `best` is the row's best arm short of pooling."""

    text: str
    interval: str = ""
    reason: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A table row: a site, its test patients, a cell per arm."""

    site: str
    n: str
    cells: tuple[Cell, ...]
    aggregate: bool
    missing: Unmeasured | None = None


@dataclass(frozen=True)
class Comparison:
    """All arms at all sites by one metric."""

    metric: Metric
    arms: tuple[Arm, ...]
    charts: tuple[SiteChart, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class GainRow:
    """A site's gain: both values, the difference as printed, its interval, verdict and bar."""

    site: str
    n: str
    reference: str
    value: str
    difference: str
    interval: str
    verdict: str
    bar: Markup
    pooled: str = ""
    aggregate: bool = False


@dataclass(frozen=True)
class GainTable:
    """Gains of an arm over another."""

    rows: tuple[GainRow, ...]
    axis: Markup
    paired: bool
    any_worse: bool
    shows_pooled: bool = False


@dataclass(frozen=True)
class AttendanceRow:
    """A site's rounds: the strip and the count."""

    site: str
    strip: Markup
    count: str


def _keys(run: Run) -> tuple[str, ...]:
    shown = [key for key in AGGREGATES if _shown_by_any(run, key)]
    return (*run.sites, *shown)


def _shown_by_any(run: Run, key: str) -> bool:
    return any(run.estimate(arm.key, key, metric.name) for arm in run.arms for metric in run.metrics)


def _estimates(run: Run, metric: Metric) -> Iterator[Estimate]:
    for arm in run.arms:
        for key in _keys(run):
            found = run.estimate(arm.key, key, metric.name)
            if found is not None:
                yield found


def comparison(run: Run, metric: Metric) -> Comparison:
    """Charts and table of one metric for every site and aggregate."""
    keys = _keys(run)
    points = {key: points_of(run, key) if key in run.sites else {} for key in keys}
    extremes = [end for found in _estimates(run, metric) for end in (found.value, *(found.interval or ()))]
    shown = [
        one for of_site in points.values() for (_, name), ones in of_site.items() if name == metric.name for one in ones
    ]
    scale = figures.scale_for([*extremes, *shown])
    charts = tuple(_chart(run, metric, key, scale, points[key]) for key in keys)
    return Comparison(metric, run.arms, charts, tuple(_row(run, metric, key) for key in keys))


def _missing(run: Run, key: str) -> Unmeasured | None:
    """Why no arm has numbers of a site."""
    if _shown_by_any(run, key):
        return None
    return next((why for arm in run.arms if (why := unmeasured(run, arm.key, key))), None)


def _chart(run: Run, metric: Metric, key: str, scale: figures.Scale, points: Points) -> SiteChart:
    found = [(arm, run.estimate(arm.key, key, metric.name)) for arm in run.arms]
    alone = next((estimate for arm, estimate in found if arm.kind == "local" and estimate), None)
    lanes = tuple(
        Lane(
            arm,
            figures.lane(
                scale,
                arm.style,
                estimate.value,
                estimate.interval,
                alone.value if alone else None,
                points.get((arm.key, metric.name), ()),
            ),
            metric.show(estimate.value),
        )
        for arm, estimate in found
        if estimate is not None
    )
    patients = None if key in AGGREGATES else run.patients(key)
    facts = [f"{patients} test patient{'s' if patients != 1 else ''}" if patients else ""]
    facts += ["did not train"] if key in run.unseen else []
    facts += [protocol(run.acquisition(key))] if key not in AGGREGATES else []
    if key in AGGREGATES:
        facts = ["every site has the same weight" if key == "mean" else "each by a model trained without it"]
    return SiteChart(
        site_title(key),
        " · ".join(fact for fact in facts if fact),
        patients is not None and patients < SMALL_N,
        key in AGGREGATES,
        lanes,
        figures.axis(scale),
        _missing(run, key),
    )


def _row(run: Run, metric: Metric, key: str) -> Row:
    found = {arm.key: run.estimate(arm.key, key, metric.name) for arm in run.arms}
    sign = 1 if metric.larger_is_better else -1
    rivals = [sign * estimate.value for arm in run.arms if arm.kind != "pooled" and (estimate := found[arm.key])]
    best = metric.show(sign * max(rivals)) if len(rivals) > 1 else None
    cells = []
    for arm in run.arms:
        estimate = found[arm.key]
        if estimate is None:
            why = unmeasured(run, arm.key, key)
            cells.append(Cell(why.text if why else "–", reason=why.reason if why else ""))
            continue
        low_high = estimate.interval
        interval = f"{metric.show(low_high[0])} to {metric.show(low_high[1])}" if low_high else ""
        text = metric.show(estimate.value)
        cells.append(Cell(text, interval, best=arm.kind != "pooled" and text == best))
    patients = run.patients(key)
    return Row(
        site_title(key),
        "–" if patients is None else str(patients),
        tuple(cells),
        key in AGGREGATES,
        _missing(run, key),
    )


def _gain_table(run: Run, metric: Metric, gains: list[Gain], pooled: dict[str, str]) -> GainTable | None:
    if not gains:
        return None
    ends = [end for gain in gains if gain.paired for end in gain.paired.interval or ()]
    scale = figures.scale_for([*(gain.gain for gain in gains), *ends], include_zero=True)
    rows = []
    for gain in gains:
        interval = gain.paired.interval if gain.paired else None
        patients = gain.n if gain.n is not None and gain.site not in AGGREGATES else None
        rows.append(
            GainRow(
                site_title(gain.site),
                "" if patients is None else str(patients),
                metric.show(gain.reference),
                metric.show(gain.value),
                metric.difference(metric.printed(gain.gain)),
                metric.span(interval) if interval else "",
                verdict_of(metric, gain),
                figures.bar(scale, gain.gain, interval),
                pooled.get(gain.site, "–"),
                gain.site in AGGREGATES,
            )
        )
    any_worse = scale.percent(0.0) > 25  # room for the word left of zero
    return GainTable(tuple(rows), figures.axis(scale), bool(ends), any_worse, bool(pooled))


def gains_over_alone(run: Run, metric: Metric) -> GainTable | None:
    """What each training site gained over training alone, and what pooling would still add."""
    together, alone, pooled = run.arm("federated"), run.arm("local"), run.arm("pooled")
    if together is None or alone is None:
        return None

    def all_gains(reference: Arm) -> list[Gain]:
        mean = mean_gain(run, metric, together.key, reference.key)
        gains = list(site_gains(run, metric, together.key, reference.key))
        return [*gains, mean] if mean is not None and len(gains) != 1 else gains

    to_pooled = (
        {}
        if pooled is None
        else {gain.site: metric.difference(metric.printed(gain.gain)) for gain in all_gains(pooled)}
    )
    return _gain_table(run, metric, all_gains(alone), to_pooled)


def gains_at_left_out(run: Run, metric: Metric) -> GainTable | None:
    """What a site gets from a model trained without it, over the best model of one other site."""
    return _gain_table(run, metric, list(left_out_gains(run, metric)), {})


def learning_curves(run: Run, metric: Metric | None) -> tuple[Curves, ...]:
    """Loss and validation of the shared models, of each site alone, and of the models without one site."""
    names = list(dict.fromkeys(entry.arm for entry in run.rounds))
    shared = [name for name in names if "/" not in name]
    alone = [name for name in names if name.startswith("local/")]
    others = [name for name in names if "/" in name and name not in alone]
    quantities: list[tuple[str, Callable[[Round], float | None]]] = [("training loss", lambda entry: entry.loss)]
    measured = list(dict.fromkeys(name for entry in run.rounds for name in entry.validation))
    if measured:
        chosen = metric.name if metric and metric.name in measured else measured[0]
        label = (
            f"validation {metric.label}{f' ({metric.unit})' if metric.unit else ''}"
            if metric and metric.name == chosen
            else f"validation {chosen}"
        )
        quantities.insert(0, (label, lambda entry: entry.validation.get(chosen)))
    groups = (
        ("Trained together or pooled", shared),
        ("Each site alone", alone),
        ("Without one site", others),
    )
    drawn = []
    for group, members in groups:
        for label, pick in quantities:
            lines = [_curve(run, arm, index, pick) for index, arm in enumerate(members)]
            drawn.append(figures.curves(f"{group}: {label}", lines))
    return tuple(chart for chart in drawn if chart is not None)


def _curve(run: Run, name: str, index: int, pick: Callable[[Round], float | None]) -> Curve:
    points = [(float(entry.number), pick(entry)) for entry in run.history(name)]
    known = next((arm for arm in run.arms if arm.key == name), None)
    label = known.label if known else name.partition("/")[2] or name
    style = f"arm-{known.style}" if known else f"site-{index % SITE_COLOURS}"
    return Curve(
        label,
        style,
        tuple((at, value) for at, value in points if value is not None),
        run.selected_round(name),
    )


def attendance(run: Run) -> tuple[AttendanceRow, ...]:
    """Who took part in which round of the federated arm."""
    together = run.arm("federated")
    history = run.history(together.key if together else "federated")
    if not history:
        return ()
    sites = dict.fromkeys(
        [*run.training, *(site for entry in history for site in (*entry.participants, *entry.missing))]
    )
    return tuple(
        AttendanceRow(
            site,
            figures.attendance(site, history),
            f"{sum(site in entry.participants for entry in history)} of {len(history)}",
        )
        for site in sites
    )


def absences(run: Run) -> tuple[tuple[str, str, str], ...]:
    """(site, rounds, reason) of everyone who was missing, the same reason in one line."""
    together = run.arm("federated")
    found: dict[tuple[str, str], list[int]] = {}
    for entry in run.history(together.key if together else "federated"):
        for site, reason in entry.missing.items():
            found.setdefault((site, reason), []).append(entry.number)
    return tuple((site, ranges(numbers), reason) for (site, reason), numbers in found.items())


def warnings(run: Run) -> tuple[str, ...]:
    """What a reader must know before believing the numbers: facts of this run, most important first."""
    notes = Counter(str(note) for note in run.result.get("notes") or ())
    found = [f"Note of the run: {note}" + (f" ({count} times)" if count > 1 else "") for note, count in notes.items()]
    small = [f"{site} ({count})" for site in run.sites if (count := run.patients(site)) and count < SMALL_N]
    if small:
        found.append(
            f"Few test patients, fewer than {SMALL_N}: {', '.join(small)}. "
            "One unusual patient can move these numbers, and the intervals are themselves uncertain; "
            f"below {LEAST_N} there is none."
        )
    missing_at = {site: why.text for site in run.sites if (why := _missing(run, site))}
    for text, what in ((WITHHELD, "Numbers withheld by the site"), (FAILED, "Could not be measured")):
        if sites := [site for site, said in missing_at.items() if said == text]:
            found.append(f"{what}: {', '.join(sites)}.")
    saturated = [entry.number for entry in run.rounds if entry.saturated > SATURATION_LIMIT]
    if saturated:
        worst = max(entry.saturated for entry in run.rounds)
        found.append(
            f"Updates were clipped to the fixed-point range in {in_rounds(saturated)} "
            f"(at worst {worst:.2%} of the values) and are less exact there; "
            "a larger protection.initial_scale avoids it."
        )
    found += _still_learning(run)
    missing = absences(run)
    if missing:
        names = ", ".join(dict.fromkeys(site for site, _, _ in missing))
        found.append(f"Not everyone took part in every round: {names} missed some. See Who took part.")
    return tuple(found)


def _still_learning(run: Run) -> list[str]:
    late = []
    for arm in run.arms:
        history = run.history(arm.key)
        if len(history) > 2 and run.selected_round(arm.key) == history[-1].number and history[-1].validation:
            late.append(arm.label)
    if not late:
        return []
    return [
        f"Released in the very last round: {', '.join(late)}. "
        "Training may not have finished, and more rounds could change the comparison."
    ]

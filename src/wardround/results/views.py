"""What the page shows, as plain values: a run's numbers turned into rows, charts and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from wardround.results import figures
from wardround.results.answer import Gain, left_out_gains, mean_gain, site_gains, verdict_of
from wardround.results.figures import Curve, Curves
from wardround.results.metrics import MetricInfo
from wardround.results.patients import Points, points_of
from wardround.results.run import FAILED, SMALL_N, WITHHELD, Run, ShownArm, Unmeasured, site_title
from wardround.results.schema import AGGREGATES, Estimate, RoundLine
from wardround.results.units import in_rounds, protocol, ranges
from wardround.tasks.estimates import LEAST_PATIENTS
from wardround.wire.scales import CUT_OFF

SITE_COLOURS = 8

# More notes of values that were cut off stand as one.
_MOST_CUT = 3


@dataclass(frozen=True)
class Cell:
    """Value and interval, or why there is none; `best` is the row's best arm short of pooling."""

    text: str
    interval: str = ""
    reason: str = ""
    best: bool = False


@dataclass(frozen=True)
class SiteView:
    """A site or an aggregate by one metric: a lane (arm, picture, value) and a table cell for each arm."""

    title: str
    note: str
    n: str
    small: bool
    aggregate: bool
    lanes: tuple[tuple[ShownArm, Markup, str], ...]
    axis: Markup
    cells: tuple[Cell, ...]
    missing: Unmeasured | None


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


def comparison(run: Run, metric: MetricInfo) -> tuple[SiteView, ...]:
    """All arms by one metric, at every site and aggregate."""
    keys = (*run.sites, *(key for key in AGGREGATES if run.patients(key) is not None))
    points = {key: points_of(run, key) if key in run.sites else {} for key in keys}
    estimates = [found for _, key, name, found in run.result.estimates() if name == metric.name and key in keys]
    extremes = [end for found in estimates for end in (found.value, *(found.interval or ()))]
    shown = [
        one for of_site in points.values() for (_, name), ones in of_site.items() if name == metric.name for one in ones
    ]
    scale = figures.scale_for([*extremes, *shown])
    return tuple(_site(run, metric, key, scale, points[key]) for key in keys)


def _missing(run: Run, key: str) -> Unmeasured | None:
    """Why no arm has numbers of a site."""
    if run.patients(key) is not None:
        return None
    return next((why for arm in run.arms if (why := run.unmeasured(arm.key, key))), None)


def _site(run: Run, metric: MetricInfo, key: str, scale: figures.Scale, points: Points) -> SiteView:
    found = {arm: run.result.estimate(arm.key, key, metric.name) for arm in run.arms_in(metric)}
    alone = next((estimate.value for arm, estimate in found.items() if arm.kind == "local" and estimate), None)
    lanes = [
        (
            arm,
            figures.lane(scale, arm.style, one.value, one.interval, alone, points.get((arm.key, metric.name), ())),
            metric.show(one.value),
        )
        for arm, one in found.items()
        if one is not None
    ]
    best = best_shown(metric, found)
    patients, aggregate = run.patients(key), key in AGGREGATES
    if aggregate:
        facts = ["every site has the same weight" if key == "mean" else "each by a model trained without it"]
    else:
        facts = [f"{patients} test patient{'s' if patients != 1 else ''}" if patients else ""]
        shown = key in run.evaluating or not run.trained
        facts += [run.role(key) if shown else "did not train" if key in run.unseen else ""]
        facts.append(protocol(run.acquisition(key)))
    return SiteView(
        title=site_title(key, trained=run.trained),
        note=" · ".join(fact for fact in facts if fact),
        n="–" if patients is None else str(patients),
        small=not aggregate and patients is not None and patients < SMALL_N,
        aggregate=aggregate,
        lanes=tuple(lanes),
        axis=figures.axis(scale),
        cells=tuple(_cell(run, metric, arm, key, one, best) for arm, one in found.items()),
        missing=_missing(run, key),
    )


def _cell(run: Run, metric: MetricInfo, arm: ShownArm, key: str, found: Estimate | None, best: str | None) -> Cell:
    if found is None:
        why = run.unmeasured(arm.key, key)
        return Cell(why.text, reason=why.reason) if why else Cell("–")
    return cell_of(metric, arm, found, best)


def best_shown(metric: MetricInfo, found: Mapping[ShownArm, Estimate | None]) -> str | None:
    """The best value of several arms but pooled, as it is shown; None where there are not two to compare."""
    rivals = [metric.printed(one.value) for arm, one in found.items() if one is not None and arm.kind != "pooled"]
    return metric.show(metric.printed(max(rivals))) if len(rivals) > 1 else None


def cell_of(metric: MetricInfo, arm: ShownArm, found: Estimate, best: str | None) -> Cell:
    """An arm's value with its interval; `best` is that of `best_shown`."""
    text = metric.show(found.value)
    interval = " to ".join(metric.show(end) for end in found.interval or ())
    return Cell(text, interval, best=arm.kind != "pooled" and text == best)


def _gain_table(metric: MetricInfo, gains: list[Gain], pooled: dict[str, str]) -> GainTable | None:
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


def gains_over_alone(run: Run, metric: MetricInfo) -> GainTable | None:
    """What each training site gained over training alone, and what pooling would still add."""
    together, alone, pooled = run.arm("federated"), run.arm("local"), run.arm("pooled")
    if together is None or alone is None:
        return None

    def all_gains(reference: ShownArm) -> list[Gain]:
        mean = mean_gain(run, metric, together.key, reference.key)
        gains = list(site_gains(run, metric, together.key, reference.key))
        return [*gains, mean] if mean is not None and len(gains) != 1 else gains

    further = all_gains(pooled) if pooled else []
    return _gain_table(metric, all_gains(alone), {g.site: metric.difference(metric.printed(g.gain)) for g in further})


def gains_at_left_out(run: Run, metric: MetricInfo) -> GainTable | None:
    """What a site gets from a model trained without it, over the best model of one other site."""
    return _gain_table(metric, list(left_out_gains(run, metric)), {})


@dataclass(frozen=True)
class GateRow:
    """A site in the gate: its number of patients, difference, interval, verdict with what is to say of it, picture."""

    site: str
    n: str
    difference: str
    interval: str
    verdict: str
    why: str
    lane: Markup


@dataclass(frozen=True)
class GateTable:
    """The gate by one metric; differences are positive where the new model is better."""

    metric: MetricInfo
    margin: str
    rows: tuple[GateRow, ...]
    axis: Markup


def gate_tables(run: Run) -> tuple[GateTable, ...]:
    """What the gate says by each of its metrics; nothing of a study that continues no release."""
    gate = run.result.gate
    names = {name for of_site in gate.sites.values() for name in of_site} if gate else set()
    return tuple(_gate_table(run, metric) for metric in run.result.metric_specs if metric.name in names)


def _gate_table(run: Run, metric: MetricInfo) -> GateTable:
    gate = run.result.gate
    assert gate is not None
    entries = {site: of_site[metric.name] for site, of_site in gate.sites.items()}
    margin = next(iter(entries.values())).margin
    known = [one for entry in entries.values() for one in (entry.gain, entry.ci_low, entry.ci_high) if one is not None]
    scale = figures.scale_for([*known, -1.5 * margin, margin], include_zero=True)
    rows = []
    for site, entry in entries.items():
        ends = None if entry.ci_low is None or entry.ci_high is None else (entry.ci_low, entry.ci_high)
        rows.append(
            GateRow(
                site,
                str(entry.n) if entry.n else "–",
                "–" if entry.gain is None else metric.difference(entry.gain),
                "" if ends is None else " to ".join(metric.difference(end) for end in ends),
                entry.verdict,
                entry.why,
                figures.against_margin(scale, entry.gain, ends, margin),
            )
        )
    return GateTable(metric, metric.show(margin), tuple(rows), figures.axis(scale))


def learning_curves(run: Run, metric: MetricInfo | None) -> tuple[Curves, ...]:
    """Loss and validation of the shared models, of each site alone, and of the models without one site."""
    names = list(dict.fromkeys(entry.arm for entry in run.rounds))
    groups = {"Trained together or pooled": "", "Each site alone": "local", "Without one site": "without"}
    quantities: list[tuple[str, Callable[[RoundLine], float | None]]] = [("training loss", lambda entry: entry.loss)]
    measured = list(dict.fromkeys(name for entry in run.rounds for name in entry.validation or ()))
    if measured:
        chosen = metric.name if metric and metric.name in measured else measured[0]
        label = f"validation {metric.heading if metric and metric.name == chosen else chosen}"
        quantities.insert(0, (label, lambda entry: (entry.validation or {}).get(chosen)))
    drawn = []
    for group, prefix in groups.items():
        members = [name for name in names if (name.partition("/")[0] if "/" in name else "") == prefix]
        for label, pick in quantities:
            lines = [_curve(run, arm, index, pick) for index, arm in enumerate(members)]
            drawn.append(figures.curves(f"{group}: {label}", lines))
    return tuple(chart for chart in drawn if chart is not None)


def _curve(run: Run, name: str, index: int, pick: Callable[[RoundLine], float | None]) -> Curve:
    points = [(float(entry.round), pick(entry)) for entry in run.history(name)]
    known = next((arm for arm in run.arms if arm.key == name), None)
    label = known.label if known else name.partition("/")[2] or name
    style = f"arm-{known.style}" if known else f"site-{index % SITE_COLOURS}"
    return Curve(
        label,
        style,
        tuple((at, value) for at, value in points if value is not None),
        run.result.selected_round.get(name),
    )


def attendance(run: Run) -> tuple[tuple[str, Markup, str], ...]:
    """(site, strip, count) of who took part in which round of the federated arm."""
    history = run.federated_history
    return tuple(
        (
            site,
            figures.attendance(site, history),
            f"{sum(site in entry.participants for entry in history)} of {len(history)}",
        )
        for site in (run.training if history else ())
    )


def absences(run: Run) -> tuple[tuple[str, str, str], ...]:
    """(site, rounds, reason) of everyone who was missing, the same reason in one line."""
    found: dict[tuple[str, str], list[int]] = {}
    for entry in run.federated_history:
        for site, reason in entry.missing.items():
            found.setdefault((site, reason), []).append(entry.round)
    return tuple((site, ranges(numbers), reason) for (site, reason), numbers in found.items())


def warnings(run: Run) -> tuple[str, ...]:
    """What a reader must know before believing the numbers: facts of this run, most important first."""
    cut = [match.group(1) for note in run.result.notes if (match := CUT_OFF.search(note))]
    single = len(cut) <= _MOST_CUT
    notes = Counter(note for note in run.result.notes if single or not CUT_OFF.search(note))
    found = [f"Note of the run: {note}" + (f" ({count} times)" if count > 1 else "") for note, count in notes.items()]
    small = [f"{site} ({count})" for site in run.sites if (count := run.patients(site)) and count < SMALL_N]
    if small:
        found.append(
            f"Few test patients, fewer than {SMALL_N}: {', '.join(small)}. "
            "One unusual patient can move these numbers, and the intervals are themselves uncertain; "
            f"below {LEAST_PATIENTS} there is none."
        )
    if aside := [
        f"{site} ({'withheld' if count is None else count})"
        for site, count in run.result.set_aside.items()
        if count != 0
    ]:
        found.append(f"Patients set aside at their site, for their files cannot be used: {', '.join(aside)}.")
    for metric in run.result.measured:
        absent = {
            site: one.absent
            for _, site, name, one in run.result.estimates()
            if name == metric.name and one.absent and site in run.sites
        }
        if absent:
            places = ", ".join(f"{site} ({count})" for site, count in absent.items())
            found.append(f"Patients without a value of {metric.label}, who count in none of its means: {places}.")
    missing_at = {site: why.text for site in run.sites if (why := _missing(run, site))}
    for text, what in ((WITHHELD, "Numbers withheld by the site"), (FAILED, "Could not be measured")):
        if sites := [site for site, said in missing_at.items() if said == text]:
            found.append(f"{what}: {', '.join(sites)}.")
    if run.saturated:
        worst = max(line.saturated for line in run.saturated)
        of, listed = "the values", ""
        if not single:
            of, listed = f"a tensor, in {len(set(cut))} of them", " `notes` in result.json lists each."
        found.append(
            f"Updates were clipped to the fixed-point range in {in_rounds([line.round for line in run.saturated])} "
            f"(at worst {worst:.2%} of {of}) and are less exact there; "
            f"a larger protection.initial_scale avoids it.{listed}"
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
        released = run.result.selected_round.get(arm.key)
        if len(history) > 2 and released == history[-1].round and history[-1].validation:
            late.append(arm.label)
    if not late:
        return []
    return [
        f"Released in the very last round: {', '.join(late)}. "
        "Training may not have finished, and more rounds could change the comparison."
    ]

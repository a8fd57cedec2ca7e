"""The report's chart of single test patients: each with the shared model against without it.

Drawn only where a run on one machine wrote the site's patients into the site's own folder. Patients are numbers here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from wardround.results import figures
from wardround.results.answer import best_baseline
from wardround.results.metrics import MetricInfo
from wardround.results.patients import numbered_points_of
from wardround.results.run import Run, ShownArm

HEIGHT = 190  # px, of a chart
_NUMBERED = 24  # with more patients, only the first and the last column have their number below
_CROWDED = 60  # with more patients, marks are smaller


@dataclass(frozen=True)
class Pair:
    """One patient's value of both arms; a positive `gain` is better whatever the metric's direction."""

    number: int
    before: float
    after: float
    gain: float


@dataclass(frozen=True)
class PairedChart:
    """A site's patients in order of their gain: what the page lays out."""

    site: str
    before: ShownArm
    after: ShownArm
    counts: str
    worst: str
    best: str
    summary: str
    y_axis: Markup
    plot: Markup
    x_axis: Markup
    height: int = HEIGHT


def paired_charts(run: Run, metric: MetricInfo) -> tuple[PairedChart, ...]:
    """A chart for each site whose folder holds patients of both arms: together, and alone or the best baseline."""
    after, alone = run.arm("federated"), run.arm("local")
    charts = []
    for site in run.sites if after else ():
        values = {arm: found for (arm, name), found in numbered_points_of(run, site).items() if name == metric.name}
        before = alone if alone and alone.key in values else (best_baseline(run, metric, site) or (None,))[0]
        if after and before and (pairs := pairs_of(values.get(before.key, {}), values.get(after.key, {}), metric)):
            charts.append(_chart(site, before, after, pairs, metric))
    return tuple(charts)


def pairs_of(before: Mapping[int, float], after: Mapping[int, float], metric: MetricInfo) -> tuple[Pair, ...]:
    """The patients that have both values, from the least gain to the largest."""
    numbers = sorted(before.keys() & after.keys())
    found = (Pair(n, before[n], after[n], metric.gain(after[n], before[n])) for n in numbers)
    return tuple(sorted(found, key=lambda pair: pair.gain))


def _chart(site: str, before: ShownArm, after: ShownArm, pairs: Sequence[Pair], metric: MetricInfo) -> PairedChart:
    better = sum(pair.gain >= metric.negligible for pair in pairs)
    worse = sum(pair.gain <= -metric.negligible for pair in pairs)
    alike = len(pairs) - better - worse
    counts = f"{len(pairs)} test patient{'s' if len(pairs) != 1 else ''}: {better} better, {worse} worse"
    counts += f", {alike} unchanged" if alike else ""
    worst, best = (_end(pair, metric) for pair in (pairs[0], pairs[-1]))
    scale = figures.scale_for([value for pair in pairs for value in (pair.before, pair.after)], ticks=5)
    return PairedChart(
        site,
        before,
        after,
        counts,
        worst,
        best,
        f"{site}, {after.label} against {before.label}: {counts}. Least gain: {worst}. Largest gain: {best}.",
        _y_axis(scale),
        _plot(scale, before, after, pairs, metric),
        _x_axis(pairs),
    )


def _end(pair: Pair, metric: MetricInfo) -> str:
    return f"patient {pair.number}, {metric.signed(metric.printed(pair.gain))}"


def _height(scale: figures.Scale, value: float) -> float:
    return round(HEIGHT * (1 - scale.percent(value) / 100), 2)


def _y_axis(scale: figures.Scale) -> Markup:
    tick = Markup('<text x="100%" dx="-6" y="{}" dy="4" text-anchor="end">{}</text>')
    return Markup("").join(tick.format(_height(scale, value), scale.label(value)) for value in scale.ticks)


def _at(index: int, count: int) -> float:
    """The place of a column in percent."""
    return round(100 * (index + 0.5) / count, 3)


def _plot(scale: figures.Scale, before: ShownArm, after: ShownArm, pairs: Sequence[Pair], metric: MetricInfo) -> Markup:
    size = 2.0 if len(pairs) > _CROWDED else 3.6
    grid = Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>')
    column = Markup(
        "<g><title>Patient {number}: {text}</title>"
        '<line class="pair {way}" x1="{x}%" x2="{x}%" y1="{y0}" y2="{y1}"/>'
        '<svg x="{x}%" y="{y0}" overflow="visible"><rect class="before arm-{before}" x="-{s}" y="-{s}" width="{w}" '
        'height="{w}"/></svg><circle class="after arm-{after}" cx="{x}%" cy="{y1}" r="{r}"/></g>'
    )
    parts = [grid.format(_height(scale, tick)) for tick in scale.ticks]
    for index, pair in enumerate(pairs):
        text = f"{metric.show(pair.before)} to {metric.amount(pair.after)}"
        way = "gain-up" if pair.gain >= 0 else "gain-down"
        places = {"x": _at(index, len(pairs)), "y0": _height(scale, pair.before), "y1": _height(scale, pair.after)}
        sizes = {"s": size - 0.4, "w": round(2 * (size - 0.4), 2), "r": size + 0.6}
        styles = {"before": before.style, "after": after.style, "way": way}
        parts.append(column.format(number=pair.number, text=text, **places, **sizes, **styles))
    return Markup("").join(parts)


def _x_axis(pairs: Sequence[Pair]) -> Markup:
    last = len(pairs) - 1
    shown = [index for index in range(len(pairs)) if len(pairs) <= _NUMBERED or index in (0, last)]
    tick = Markup('<text x="{}%" y="13" text-anchor="middle">{}</text>')
    texts = Markup("").join(tick.format(_at(index, len(pairs)), pairs[index].number) for index in shown)
    return Markup('<svg class="axis" width="100%" height="18" aria-hidden="true">{}</svg>').format(texts)

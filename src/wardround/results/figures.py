"""Charts as inline SVG that keeps its text readable at any width and its colours in the page's theme.

Horizontal positions are percentages, so a chart stretches with the page while text and marks keep their size.
Every mark has a shape besides its colour. All text passes through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from wardround.results.metrics import MINUS
from wardround.results.schema import RoundLine

LANE = 24  # px, the height of a row in a dot chart
PLOT = 200  # px, the height of a learning curve
_LABEL_GAP = 15.0  # px between names at the right of a learning curve
_CROSSED_ROUNDS = 60  # with more rounds a cross no longer fits into its cell

_MARKS = {
    "zero-filled": Markup('<rect class="hollow" x="-4" y="-4" width="8" height="8"/>'),
    "cg-sense": Markup('<path class="hollow" d="M0-5.5 5.5 0 0 5.5-5.5 0Z"/>'),
    "tv": Markup('<path class="hollow" d="M0-5.2 5.4 4.2H-5.4Z"/>'),
    "local": Markup('<rect x="-4.5" y="-4.5" width="9" height="9"/>'),
    "federated": Markup('<circle r="5.5"/>'),
    "pooled": Markup('<path d="M0-6.5 6.5 0 0 6.5-6.5 0Z"/>'),
    "other-0": Markup('<path d="M0 5.2 5.4-4.2H-5.4Z"/>'),
    "other-1": Markup('<circle class="hollow" r="5"/>'),
    "other-2": Markup('<path class="stroke" d="M-4.5-4.5 4.5 4.5M-4.5 4.5 4.5-4.5"/>'),
    "other-3": Markup('<path class="stroke" d="M-5.5 0H5.5M0-5.5V5.5"/>'),
}


@dataclass(frozen=True)
class Scale:
    """A linear axis: values between `low` and `high` onto 0..100 percent."""

    low: float
    high: float
    ticks: tuple[float, ...]
    decimals: int

    def percent(self, value: float) -> float:
        """The place of a value; what lies outside stays at the edge."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 3)

    def label(self, tick: float) -> str:
        """A tick's text, with as many decimals as the ticks' spacing needs."""
        text = f"{tick:.{self.decimals}f}"
        return text if float(text) == 0 else text.replace("-", MINUS)


def scale_for(values: Iterable[float], *, include_zero: bool = False, ticks: int = 5, room: float = 0.05) -> Scale:
    """An axis with round ticks that holds all finite values and a little room."""
    finite = [value for value in values if math.isfinite(value)] + ([0.0] if include_zero else [])
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    span = high - low or abs(high) * 0.1 or 1.0
    low, high = low - room * span, high + room * span
    found = [float(tick) for tick in MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    step = found[1] - found[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    return Scale(low, high, tuple(tick for tick in found if low <= tick <= high), decimals)


def mark(style: str) -> Markup:
    """The mark of an arm as a small image of its own, for legends."""
    shape = _MARKS.get(style, _MARKS["other-1"])
    return Markup(
        '<svg class="key arm-{}" width="16" height="16" aria-hidden="true"><g transform="translate(8 8)">{}</g></svg>'
    ).format(style, shape)


def _grid(scale: Scale, height: int) -> Markup:
    line = Markup('<line class="grid" x1="{0}%" x2="{0}%" y1="0" y2="{1}"/>')
    return Markup("").join(line.format(scale.percent(tick), height) for tick in scale.ticks)


def lane(
    scale: Scale,
    style: str,
    value: float | None,
    interval: tuple[float, float] | None = None,
    guide: float | None = None,
    patients: Sequence[float] = (),
) -> Markup:
    """One row of a dot chart: grid, interval and mark; `guide` draws the dashed line one compares with.

    `patients` are single values, drawn as small points.
    """
    parts = [_grid(scale, LANE)]
    middle = LANE / 2
    point = Markup('<circle class="patient" cx="{}%" cy="{}" r="2.2"/>')
    # One above the other in turn, so that equal values do not hide each other.
    parts += [point.format(scale.percent(one), middle + 3 * (number % 5 - 2)) for number, one in enumerate(patients)]
    if guide is not None:
        at = scale.percent(guide)
        parts.append(Markup('<line class="guide" x1="{0}%" x2="{0}%" y1="0" y2="{1}"/>').format(at, LANE))
    parts += _interval(scale, interval, "interval")
    if value is not None:
        shape = Markup('<svg x="{}%" y="{}" overflow="visible">{}</svg>')
        parts.append(shape.format(scale.percent(value), middle, _MARKS.get(style, _MARKS["other-1"])))
    return _lane(parts, f"arm-{style}")


def bar(scale: Scale, value: float, interval: tuple[float, float] | None = None) -> Markup:
    """One row of a gain chart: a bar from zero, with the paired interval where there is one."""
    zero, end = scale.percent(0.0), scale.percent(value)
    parts = [
        _grid(scale, LANE),
        Markup('<rect class="bar" x="{}%" width="{}%" y="6" height="{}" rx="1.5"/>').format(
            min(zero, end), round(abs(end - zero), 3), LANE - 12
        ),
        Markup('<line class="zero" x1="{0}%" x2="{0}%" y1="0" y2="{1}"/>').format(zero, LANE),
    ]
    parts += _interval(scale, interval, "interval over")
    return _lane(parts, "gain-up" if value >= 0 else "gain-down")


def against_margin(scale: Scale, gain: float | None, interval: tuple[float, float] | None, margin: float) -> Markup:
    """One row of a gate's chart: what lies beyond the margin is shaded; the interval must stay clear of it."""
    edge, zero = scale.percent(-margin), scale.percent(0.0)
    parts = [
        Markup('<rect class="beyond" x="0" width="{}%" y="0" height="{}"/>').format(edge, LANE),
        _grid(scale, LANE),
        Markup('<line class="zero" x1="{0}%" x2="{0}%" y1="0" y2="{1}"/>').format(zero, LANE),
        Markup('<line class="margin" x1="{0}%" x2="{0}%" y1="0" y2="{1}"/>').format(edge, LANE),
        *_interval(scale, interval, "interval"),
    ]
    if gain is not None:
        shape = Markup('<svg x="{}%" y="{}" overflow="visible">{}</svg>')
        parts.append(shape.format(scale.percent(gain), LANE / 2, _MARKS["federated"]))
    return _lane(parts, "arm-federated")


def _interval(scale: Scale, ends: tuple[float, float] | None, style: str) -> list[Markup]:
    """A line between the ends of an interval, and a short one across at each."""
    if ends is None:
        return []
    low, high, middle = scale.percent(ends[0]), scale.percent(ends[1]), LANE / 2
    places = [(low, high, middle, middle), *((end, end, middle - 3, middle + 3) for end in (low, high))]
    line = Markup('<line class="{}" x1="{}%" x2="{}%" y1="{}" y2="{}"/>')
    return [line.format(style, *place) for place in places]


def _lane(parts: Sequence[Markup], style: str) -> Markup:
    head = Markup('<svg class="lane {}" width="100%" height="{}" aria-hidden="true">{}</svg>')
    return head.format(style, LANE, Markup("").join(parts))


def axis(scale: Scale) -> Markup:
    """The numbers under a dot chart or a learning curve."""
    tick = Markup('<text x="{}%" y="13" text-anchor="middle">{}</text>')
    parts = [tick.format(scale.percent(value), scale.label(value)) for value in scale.ticks]
    return Markup('<svg class="axis" width="100%" height="18" aria-hidden="true">{}</svg>').format(
        Markup("").join(parts)
    )


@dataclass(frozen=True)
class Curve:
    """One line of a learning curve: (round, value) in order; `selected` is the released round."""

    name: str
    style: str
    points: tuple[tuple[float, float], ...]
    selected: int | None = None


@dataclass(frozen=True)
class Curves:
    """A drawn learning curve: its parts are laid out by the page."""

    title: str
    summary: str
    y_axis: Markup
    plot: Markup
    names: Markup
    x_axis: Markup


def _spread(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Moves labels apart to `_LABEL_GAP`, keeping their order and staying within the plot where they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = list(wanted)
    floor = low
    for index in order:
        places[index] = max(places[index], floor)
        floor = places[index] + _LABEL_GAP
    ceiling = high
    for index in reversed(order):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - _LABEL_GAP
    return places


def curves(title: str, lines: Sequence[Curve]) -> Curves | None:
    """Learning curves on shared axes, named at their right ends; None where there is nothing to draw."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    x = scale_for([at for line in lines for at, _ in line.points], ticks=6, room=0.02)
    whole = tuple(tick for tick in x.ticks if float(tick).is_integer())
    x = Scale(x.low, x.high, whole or (round((x.low + x.high) / 2),), 0)
    values = [value for line in lines for _, value in line.points]
    y = scale_for(values, ticks=5)

    def height(value: float) -> float:
        return round(PLOT * (1 - y.percent(value) / 100), 2)

    grid = Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>')
    parts = [grid.format(height(tick)) for tick in y.ticks]
    for line in lines:
        points = " ".join(f"{x.percent(at)},{height(value)}" for at, value in line.points)
        parts.append(
            Markup(
                '<svg viewBox="0 0 100 {0}" preserveAspectRatio="none" width="100%" height="{0}">'
                '<polyline class="curve {1}" points="{2}"/></svg>'
            ).format(PLOT, line.style, points)
        )
        dots = [point for point in line.points if point[0] == line.selected or len(line.points) == 1]
        for at, value in dots:
            dot = Markup('<circle class="released {}" cx="{}%" cy="{}" r="4.5"/>')
            parts.append(dot.format(line.style, x.percent(at), height(value)))
    ends = _spread([height(line.points[-1][1]) for line in lines], 6.0, PLOT - 4.0)
    name = Markup('<text class="{}" x="4" y="{}" dy="4">{}</text>')
    first, last = lines[0].points[0], lines[0].points[-1]
    return Curves(
        title,
        f"{title}: "
        + "; ".join(f"{line.name} ends at {line.points[-1][1]:.4g}" for line in lines)
        + f". Rounds {first[0]:g} to {last[0]:g}.",
        Markup("").join(
            Markup('<text x="100%" dx="-6" y="{}" dy="4" text-anchor="end">{}</text>').format(
                height(tick), y.label(tick)
            )
            for tick in y.ticks
        ),
        Markup("").join(parts),
        Markup("").join(name.format(line.style, end, line.name) for line, end in zip(lines, ends, strict=True)),
        axis(x),
    )


def attendance(site: str, history: Sequence[RoundLine]) -> Markup:
    """A strip of rounds for one site: filled where it took part, crossed where it was missing.

    Of asynchronous rounds it is paler where the update was late, and empty where the site was at work on an older one.
    """
    width = 100 / max(len(history), 1)
    cell = Markup('<rect class="{}" x="{:.3f}%" y="6" width="{:.3f}%" height="12" rx="1.5"><title>{}</title></rect>')
    cross = Markup('<svg x="{:.3f}%" y="12" overflow="visible"><path class="cross" d="M-3-3 3 3M-3 3 3-3"/></svg>')
    gap = width * 0.12
    parts = []
    for index, entry in enumerate(history):
        here = site in entry.participants
        busy = not here and site in entry.at_work and site not in entry.missing
        look, said = ("here", "took part") if here else ("away", "missing, no reason recorded")
        if not here and site in entry.missing:
            said = f"missing, {entry.missing[site]}"
        elif busy:
            look, said = "busy", f"at work on round {entry.at_work[site]}"
        elif late := entry.staleness.get(site):
            look, said = "late", f"took part, {late} round{'s' if late > 1 else ''} late"
        parts.append(cell.format(look, index * width, width - gap, f"Round {entry.round}: {said}"))
        if look == "away" and len(history) <= _CROSSED_ROUNDS:
            parts.append(cross.format(index * width + (width - gap) / 2))
    return Markup('<svg class="strip" width="100%" height="{}" aria-hidden="true">{}</svg>').format(
        LANE, Markup("").join(parts)
    )


def reliability_plot(
    before: Sequence[tuple[float, float, float]], after: Sequence[tuple[float, float, float]]
) -> Markup:
    """A reliability diagram: mean probability across, share that came true upwards, over the line where they are equal.

    Points are (probability, share, patients), hollow squares `before` scaling and filled circles `after`; a larger mark
    stands for more patients.
    """
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    rule = Markup('<line class="grid" x1="{}%" x2="{}%" y1="{}" y2="{}"/>')
    parts = [rule.format(0, 100, PLOT * (1 - tick), PLOT * (1 - tick)) for tick in ticks]
    parts += [rule.format(100 * tick, 100 * tick, 0, PLOT) for tick in ticks]
    parts.append(Markup('<line class="equal" x1="0" x2="100%" y1="{}" y2="0"/>').format(PLOT))
    square = Markup(
        '<svg x="{0}%" y="{1}" overflow="visible">'
        '<rect class="before" x="-{2}" y="-{2}" width="{3}" height="{3}"/></svg>'
    )
    circle = Markup('<circle class="after" cx="{}%" cy="{}" r="{}"/>')
    most = max((count for *_, count in (*before, *after)), default=1.0)
    for points, shape in ((before, square), (after, circle)):
        for probability, share, count in points:
            radius = round(3 + 5 * math.sqrt(count / most), 2)
            parts.append(shape.format(round(100 * probability, 2), round(PLOT * (1 - share), 2), radius, 2 * radius))
    return Markup("").join(parts)

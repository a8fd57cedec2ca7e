"""The page `shift.html`: small charts of each site's histogram and spectrum, distances between sites, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from wardround.results.heat import EMPTY, HeatCell, HeatTable
from wardround.results.html import resource, template
from wardround.results.metrics import MINUS
from wardround.results.shift import Channel, Shift, SiteProfile, Spread
from wardround.results.views import SITE_COLOURS

Floats = npt.NDArray[np.float64]
# Of a histogram, the share of a bin from which on it is drawn.
_LEAST = 5e-4
_WIDTH, _HEIGHT = 200.0, 90.0
_ROOM = 1.06


@dataclass(frozen=True)
class Panel:
    """A site's small chart of one channel."""

    site: str
    note: str
    chart: Markup


@dataclass(frozen=True)
class Panels:
    """The charts of all sites of one channel, on the same axes; `ends` stand below each."""

    title: str
    panels: tuple[Panel, ...]
    ends: tuple[str, str, str]


def render(shift: Shift) -> str:
    """The page."""
    return template("heat.html", "shift.html").render(
        css=Markup(resource("style.css")),
        shift=shift,
        kinds=(
            (
                "Intensity",
                "Histograms of what images show, after the study's normalisation. Grey: the mean of all sites.",
                histograms(shift),
                distance_table(shift.distances.get("intensity", {})),
                "Jensen-Shannon divergence of the histograms in bits, from 0 (equal) to 1 (nothing in common).",
            ),
            (
                "Spectrum",
                "Log amplitude by frequency, less the mean of all sites: above the grey line a site has more of it, to "
                "the left coarse shapes, to the right edges and noise.",
                spectra(shift),
                distance_table(shift.distances.get("spectrum", {})),
                "Root mean square difference of the log spectra: 0.1 is about 10 % of amplitude.",
            ),
        ),
        numbers=number_table(shift),
        classes=class_table(shift),
        withheld=tuple((site, what, why) for site, p in shift.sites.items() for what, why in p.withheld.items()),
        failed=tuple(shift.failed.items()),
    )


def histograms(shift: Shift) -> tuple[Panels, ...]:
    """By channel: the bins that hold nearly everything of any site."""
    every = [c.histogram for site in shift.sites.values() for c in site.channels if c.histogram]
    most = np.max(np.array(every), axis=0) if every else np.zeros(1)
    places = np.flatnonzero(most > _LEAST)
    shown = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(None)
    centres = (shift.low + (np.arange(len(most)) + 0.5) * (shift.high - shift.low) / len(most))[shown]
    ends = _signed(centres[0]), _signed(centres[len(centres) // 2]), _signed(centres[-1])

    def drawn(number: int) -> Panels:
        curves = {site: each.histogram[shown] for site, each in _channels(shift, number) if each.histogram}
        high = max((max(curve) for curve in curves.values()), default=1.0)
        mean = np.mean(list(curves.values()), axis=0) if curves else np.zeros(0)
        notes = {site: _range(each) for site, each in _channels(shift, number)}
        return _panels(shift, shift.images[number], curves, mean, (0.0, high), notes, ends)

    return tuple(drawn(number) for number in range(len(shift.images)))


def spectra(shift: Shift) -> tuple[Panels, ...]:
    """By channel: what a site's log spectrum has above or below the mean of all."""

    def drawn(number: int) -> Panels:
        found = {site: np.array(each.spectrum) for site, each in _channels(shift, number) if each.spectrum}
        mean = np.mean(list(found.values()), axis=0) if found else np.zeros(0)
        curves = {site: tuple(map(float, curve - mean)) for site, curve in found.items()}
        most = max((abs(value) for curve in curves.values() for value in curve), default=0.0) or 1.0
        notes = {site: f"noise {each.noise.mean:.3f}" for site, each in _channels(shift, number) if each.noise}
        title = f"{shift.images[number]}, from {_signed(-most)} to {_signed(most)}"
        return _panels(
            shift, title, curves, np.zeros(len(mean)), (-most, most), notes, ("0", "0.25", "0.5 cycles/pixel")
        )

    return tuple(drawn(number) for number in range(len(shift.images)))


def _channels(shift: Shift, number: int) -> list[tuple[str, Channel]]:
    return [(site, p.channels[number]) for site, p in shift.sites.items() if number < len(p.channels)]


def _panels(
    shift: Shift,
    title: str,
    curves: Mapping[str, Sequence[float]],
    grey: Floats,
    ends_up: tuple[float, float],
    notes: Mapping[str, str],
    ends: tuple[str, str, str],
) -> Panels:
    """A panel for each site, in order; one that shows nothing says why."""
    panels = []
    for index, site in enumerate((*shift.sites, *shift.failed)):
        if site in curves:
            chart = _chart(curves[site], list(map(float, grey)), ends_up, f"site-{index % SITE_COLOURS}")
            panels.append(Panel(site, notes.get(site, ""), chart))
        else:
            panels.append(Panel(site, "stays at the site", Markup("")))
    return Panels(title, tuple(panels), ends)


def _chart(values: Sequence[float], grey: Sequence[float], ends: tuple[float, float], style: str) -> Markup:
    """A line over a grey one."""
    line = Markup('<polyline class="{}" points="{}"/>')
    head = Markup(
        '<svg class="small" viewBox="0 0 {0:g} {1:g}" preserveAspectRatio="none" width="100%" height="{1:g}" '
        'aria-hidden="true"><line class="base" x1="0" x2="{0:g}" y1="{1:g}" y2="{1:g}"/>{2}{3}</svg>'
    )
    lines = line.format("all", _points(grey, *ends)), line.format(f"curve {style}", _points(values, *ends))
    return head.format(_WIDTH, _HEIGHT, *lines)


def _points(values: Sequence[float], low: float, high: float) -> str:
    span = (high - low) * _ROOM or 1.0
    step = _WIDTH / max(len(values) - 1, 1)
    return " ".join(f"{i * step:.1f},{_HEIGHT * (1 - (value - low) / span):.2f}" for i, value in enumerate(values))


def _range(channel: Channel) -> str:
    """Where most of the values lie."""
    low, high = (channel.percentiles.get(name) for name in ("p5", "p95"))
    return "" if low is None or high is None else f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    text = f"{value:.2f}"
    return text.replace("-", MINUS) if float(text) else "0.00"


def distance_table(found: Mapping[str, Mapping[str, float]]) -> HeatTable | None:
    """Distances between sites; nothing of fewer than two."""
    if len(found) < 2:
        return None
    largest = max(value for row in found.values() for value in row.values()) or 1.0

    def cell(a: str, b: str) -> HeatCell:
        if a == b:
            return HeatCell("–", own=True)
        return HeatCell(f"{found[a][b]:.3f}", found[a][b] / largest) if b in found[a] else EMPTY

    names = tuple(found)
    return HeatTable("Site", names, tuple((a, tuple(cell(a, b) for b in names)) for a in names))


def number_table(shift: Shift) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """A head of sites, and rows: patients, matrix, spacing, intensity and noise by channel, structures."""
    structures = list(dict.fromkeys(name for site in shift.sites.values() for name in site.structures))
    head = ["Site", "Patients", "Matrix", "Voxel, mm"]
    for image in shift.images:
        head += [f"{image}: 5 %, median, 95 %", f"{image}: noise"]
    for name in structures:
        head += [f"{name}: share of voxels", f"{name}: slices with it", f"{name}: mL"]
    rows = [_numbers(shift, site, profile, structures) for site, profile in shift.sites.items()]
    kept = [column for column in range(len(head)) if any(row[column] != "–" for row in rows)]
    return tuple(row[0] for row in ([head[0]], *rows)), tuple(
        (head[column], *(row[column] for row in rows)) for column in kept[1:]
    )


def _numbers(shift: Shift, site: str, profile: SiteProfile, structures: Sequence[str]) -> list[str]:
    patients = "–" if profile.patients is None else f"{profile.patients} ({profile.split})"
    row = [site, patients, _sizes(profile.matrix, 0), _sizes(profile.spacing, 2)]
    for number in range(len(shift.images)):
        channel = profile.channels[number] if number < len(profile.channels) else Channel()
        percentiles = [channel.percentiles.get(name) for name in ("p5", "p50", "p95")]
        row.append(", ".join(_signed(value) for value in percentiles if value is not None) or "–")
        row.append(_spread(channel.noise, 3))
    for name in structures:
        drawn = profile.structures.get(name)
        row.append(_spread(None if drawn is None else drawn.share, 2, 100.0, " %"))
        row.append(_spread(None if drawn is None else drawn.slices, 0, 100.0, " %"))
        row.append(_spread(None if drawn is None else drawn.volume_ml, 1))
    return row


def _spread(found: Spread | None, decimals: int, scale: float = 1.0, unit: str = "") -> str:
    """Mean and deviation; of one patient, or of equal ones, the mean alone."""
    if found is None:
        return "–"
    mean = f"{scale * found.mean:.{decimals}f}"
    return f"{mean} ± {scale * found.std:.{decimals}f}{unit}" if found.std > 0 else f"{mean}{unit}"


def _sizes(axes: Sequence[Spread], decimals: int) -> str:
    """Sizes along the axes, of pictures two; a spread only where there is one."""
    pictures = len(axes) == 3 and (axes[2].mean, axes[2].std) in ((1.0, 0.0), (0.0, 0.0))
    shown = [
        f"{axis.mean:.{decimals}f}" + (f" ± {axis.std:.{decimals}f}" if round(axis.std, decimals) else "")
        for axis in (axes[:2] if pictures else axes)
    ]
    return " x ".join(shown) or "–"


def class_table(shift: Shift) -> HeatTable | None:
    """The share of a site's patients that have each class."""
    names = list(dict.fromkeys(name for site in shift.sites.values() for name in site.classes))
    if not names:
        return None
    rows = []
    for site, profile in shift.sites.items():
        total = profile.patients or 1
        cells = tuple(
            HeatCell(f"{100 * count / total:.1f} %", count / total, str(count))
            if (count := profile.classes.get(name)) is not None
            else EMPTY
            for name in names
        )
        rows.append((site, cells))
    return HeatTable("Site", tuple(names), tuple(rows))

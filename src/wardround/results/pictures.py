"""A site's example pictures as PNG data URIs: every arm's image, and how far it is from the reference."""

from __future__ import annotations

import base64
import io
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wardround.results.metrics import MetricInfo
from wardround.results.patients import NumberedPoints, numbered_points_of
from wardround.results.run import Run, ShownArm, arm_of, arms_in_order
from wardround.wire.archives import read_npz

ERROR_GAIN = 5
BUDGET = 2_600_000  # characters of all data URIs, so that the page stays below 4 MB
_FITS = ((3, 320), (2, 320), (1, 320), (1, 192), (1, 128), (1, 64))  # examples a site, longest side
_REFERENCE, _WINDOW, _TURN = "reference", "window", "turn"
_LEGEND, _CAPTION, _TITLE, _PATIENT = "legend", "caption", "title", "patient"

Picture = NDArray[Any]  # float32 (H, W), or uint8 (H, W, 3) as the task drew it


@dataclass(frozen=True)
class Frame:
    """Grey from `low` to `high`; a value counts `scale` of `unit`, or is of no unit."""

    name: str
    low: float
    high: float
    unit: str = ""
    scale: float = 1.0

    @property
    def grey(self) -> str:
        """What black and white stand for."""
        return self.name or f"grey {self.low:g} to {self.high:.2f}"

    @property
    def error(self) -> str:
        """What white stands for in an error map."""
        top = (self.high - self.low) / ERROR_GAIN * self.scale
        return f"{top:.0f} {self.unit}" if self.unit else f"{top:.3f}"


@dataclass(frozen=True)
class Panel:
    """One arm's picture, of a reconstruction its error map and the PSNR of this slice in dB (`psnr`), and words."""

    label: str
    style: str
    image: str
    error: str | None = None
    psnr: float | None = None
    caption: str = ""


@dataclass(frozen=True)
class ShownExample:
    """Pictures of one slice in one window, which all share; error maps are amplified in it.

    Pictures that the task drew have no window, and a title.
    """

    number: int
    window: Frame | None
    panels: tuple[Panel, ...]
    title: str = ""

    @property
    def one_picture(self) -> bool:
        """Whether all panels are of the first one's picture, and differ in their captions."""
        return len(self.panels) > 1 and not any(panel.image for panel in self.panels[1:])


@dataclass(frozen=True)
class Gallery:
    """The pictures of all sites that have some, and whether they were shrunk to keep the page small."""

    sites: dict[str, tuple[ShownExample, ...]]
    shrunk: bool = False
    legend: tuple[tuple[str, str], ...] = ()

    @property
    def framed(self) -> bool:
        """Whether pictures are shown in named windows."""
        return any(example.window.name for example in self._examples if example.window)

    @property
    def images(self) -> dict[str, tuple[ShownExample, ...]]:
        """Of these the images that were reconstructed, with error maps."""
        return self._of(lambda example: example.window is not None)

    @property
    def drawn(self) -> dict[str, tuple[ShownExample, ...]]:
        """And those that the task drew."""
        return self._of(lambda example: example.window is None)

    def _of(self, wanted: Callable[[ShownExample], bool]) -> dict[str, tuple[ShownExample, ...]]:
        found = {site: tuple(filter(wanted, examples)) for site, examples in self.sites.items()}
        return {site: examples for site, examples in found.items() if examples}

    @property
    def _examples(self) -> Iterator[ShownExample]:
        return (example for examples in self.sites.values() for example in examples)


@dataclass(frozen=True)
class Shown:
    """What a site's picture file holds: pictures by example and arm, and the windows to show them in."""

    examples: dict[int, dict[str, Picture]]
    frames: tuple[Frame, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()  # words, and a colour of CSS
    captions: Mapping[tuple[str, int], str] = field(default_factory=dict)
    patients: Mapping[int, tuple[str, int]] = field(default_factory=dict)  # by example: title, place in patients.csv


def read_pictures(path: Path) -> Shown:
    """A site's `pictures.npz`; nothing where there is no readable file.

    Entries that are neither 2-D arrays nor colours, uint8 (H, W, 3), or have another shape than their reference, are
    left out. Pictures in grey are turned as the file says that they are to be shown.
    """
    try:
        stored = read_npz(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return Shown({})
    arrays = {key: np.abs(array) if np.iscomplexobj(array) else array for key, array in stored.items()}
    examples: dict[int, dict[str, Picture]] = {}
    for key, array in arrays.items():
        arm, _, index = key.rpartition("/")
        if arm and index.isdigit() and array.size and (array.ndim == 2 or _is_colour(array)):
            shown = array if _is_colour(array) else np.nan_to_num(array.astype(np.float32))
            examples.setdefault(int(index), {})[arm] = shown
    whole = {
        index: {
            arm: _turned(image, arrays.get(f"{_TURN}/{index}"))
            for arm, image in arms.items()
            if image.shape == arms[_REFERENCE].shape
        }
        for index, arms in sorted(examples.items())
        if _REFERENCE in arms
    }
    legend = tuple(
        (key.removeprefix(f"{_LEGEND}/"), f"rgb({', '.join(map(str, array.tolist()))})")
        for key, array in arrays.items()
        if key.startswith(f"{_LEGEND}/") and array.shape == (3,) and array.dtype == np.uint8
    )
    captions = {
        (arm, number): str(arrays[key])
        for number, arms in whole.items()
        for arm in arms
        if (key := f"{_CAPTION}/{arm}/{number}") in arrays
    }
    patients = {
        number: (str(arrays[f"{_TITLE}/{number}"]), int(arrays[key]))
        for number in whole
        if (key := f"{_PATIENT}/{number}") in arrays and f"{_TITLE}/{number}" in arrays
    }
    return Shown(whole, tuple(_frames(arrays)), legend, captions, patients)


def _is_colour(array: NDArray[Any]) -> bool:
    return array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8


def _turned(image: Picture, turn: NDArray[np.generic] | None) -> Picture:
    if turn is None or turn.shape != (3,) or image.ndim != 2:
        return image
    swap, rows, columns = (bool(value) for value in turn)
    turned = image.T if swap else image
    return np.ascontiguousarray(turned[:: -1 if rows else 1, :: -1 if columns else 1])


def _frames(arrays: dict[str, NDArray[np.generic]]) -> Iterator[Frame]:
    for key, array in arrays.items():
        kind, _, rest = key.partition("/")
        if kind == _WINDOW and array.shape == (3,):
            low, high, scale = (float(value) for value in array)
            name, _, unit = rest.partition("/")
            if high > low:
                yield Frame(name, low, high, unit, scale)


def psnr(image: Picture, reference: Picture, frame: Frame | None = None) -> float:
    """Peak signal-to-noise ratio in dB, infinite for equal pictures.

    For a peak of 1, or of pictures cut off at a window's ends, for the window's width.
    """
    first, second = image.astype(np.float64), reference.astype(np.float64)
    if frame is not None:
        first, second = (np.clip((x - frame.low) / (frame.high - frame.low), 0, 1) for x in (first, second))
    error = float(np.mean((first - second) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def _encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _png(array: Picture, low: float, high: float, side: int, palette: bytes | None = None) -> str:
    levels = np.clip((array - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)
    picture = Image.fromarray(levels)
    picture.thumbnail((side, side), Image.Resampling.BOX)
    if palette is not None:
        picture = picture.copy()
        picture.putpalette(palette)
    return _encode(picture)


def _palette() -> bytes:
    colours = matplotlib.colormaps["inferno"](np.linspace(0, 1, 256), bytes=True)
    return bytes(np.asarray(colours)[:, :3].tobytes())


def _drawn(
    arms_shown: Sequence[ShownArm],
    metric: MetricInfo | None,
    number: int,
    shown: Shown,
    side: int,
    values: NumberedPoints,
) -> ShownExample:
    """An example whose task drew it; what stands below is the task's caption, or the patient's value."""
    arms, (title, place) = shown.examples[number], shown.patients.get(number, ("", -1))

    def caption(key: str) -> str:
        if metric is not None and (value := values.get((key, metric.name), {}).get(place)) is not None:
            return f"{metric.label} {metric.show(value)}"
        return shown.captions.get((key, number), "")

    def panel(label: str, style: str, key: str) -> Panel:
        picture = Image.fromarray(arms[key].astype(np.uint8))
        picture.thumbnail((side, side), Image.Resampling.BOX)
        # A palette is a third of the bytes, and alike to the eye.
        return Panel(label, style, _encode(picture.quantize(dither=Image.Dither.NONE)), caption=caption(key))

    order = list(_in_order(arms_shown, arms))
    # Where all arms differ in words alone, there is one picture; a single one may be alike because it marks nothing.
    alike = all(np.array_equal(arms[arm.key], arms[_REFERENCE]) for arm in order)
    found = [panel(arm.label, arm.style, arm.key) for arm in order]
    panels = [
        panel("Truth", _REFERENCE, _REFERENCE),
        *(replace(each, image="") if alike else each for each in found),
    ]
    return ShownExample(number, None, tuple(panels), f"{title}, number {place}" if title else "")


def _in_order(arms_shown: Sequence[ShownArm], arms: Iterable[str]) -> Iterator[ShownArm]:
    """The arms that have a picture in reading order, then those that are not known."""
    named = {arm.key: arm for arm in arms_shown}
    order = [key for key in named if key in arms] + [key for key in arms if key not in named]
    for index, key in enumerate(key for key in order if key != _REFERENCE):
        yield named.get(key) or arm_of(key, index)


def _example(
    arms_shown: Sequence[ShownArm],
    number: int,
    arms: dict[str, Picture],
    given: Frame | None,
    side: int,
    palette: bytes,
) -> ShownExample:
    reference = arms[_REFERENCE]
    frame = given or Frame("", 0.0, float(np.quantile(reference, 0.998)) or 1.0)
    panels = [Panel("Reference", _REFERENCE, _png(reference, frame.low, frame.high, side))]
    for arm in _in_order(arms_shown, arms):
        key = arm.key
        error = np.abs(arms[key] - reference)
        panels.append(
            Panel(
                arm.label,
                arm.style,
                _png(arms[key], frame.low, frame.high, side),
                _png(error, 0.0, (frame.high - frame.low) / ERROR_GAIN, side, palette),
                psnr(arms[key], reference, given),
            )
        )
    return ShownExample(number, frame, tuple(panels))


def _weight(sites: dict[str, tuple[ShownExample, ...]]) -> int:
    return sum(
        len(panel.image) + len(panel.error or "")
        for examples in sites.values()
        for example in examples
        for panel in example.panels
    )


def _first(examples: Mapping[int, dict[str, Picture]], count: int) -> Iterator[tuple[int, dict[str, Picture]]]:
    """So many examples of images, and so many that the task drew."""
    for axes in (2, 3):
        yield from islice(((n, arms) for n, arms in examples.items() if arms[_REFERENCE].ndim == axes), count)


def gallery(run: Run) -> Gallery:
    """The pictures of every site, fewer and smaller where they would make the page too large."""
    # Where numbers stay, pictures stay; a site that failed may not have come to say so.
    open_sites = [site for site in run.sites if site not in run.hidden]
    found = {site: read_pictures(run.folder / "sites" / site / "pictures.npz") for site in open_sites}
    values = {site: numbered_points_of(run, site) for site in open_sites}
    return _gallery(found, run.arms, next(iter(run.result.measured), None), values)


def own_gallery(folder: Path, site: str) -> Gallery:
    """The pictures of one site in its own folder, where there is no result of the run."""
    shown = read_pictures(folder / "sites" / site / "pictures.npz")
    keys = dict.fromkeys(key for arms in shown.examples.values() for key in arms if key != _REFERENCE)
    return _gallery({site: shown}, arms_in_order(keys), None, {})


def _gallery(
    found: Mapping[str, Shown],
    arms_shown: Sequence[ShownArm],
    metric: MetricInfo | None,
    values: Mapping[str, NumberedPoints],
) -> Gallery:
    legend = tuple(dict.fromkeys(entry for shown in found.values() for entry in shown.legend))
    palette = _palette()
    sites: dict[str, tuple[ShownExample, ...]] = {}
    for attempt, (count, side) in enumerate(_FITS):
        sites = {
            site: tuple(
                _drawn(arms_shown, metric, number, shown, side, values.get(site, {}))
                if arms[_REFERENCE].ndim == 3
                else _example(arms_shown, number, arms, frame, side, palette)
                for number, arms in _first(shown.examples, count)
                for frame in (shown.frames if arms[_REFERENCE].ndim == 2 else ()) or (None,)
            )
            for site, shown in found.items()
            if shown.examples
        }
        if _weight(sites) <= BUDGET:
            return Gallery(sites, attempt > 2, legend)
    return Gallery(sites, True, legend)

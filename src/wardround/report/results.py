"""A run directory as typed, read-only values: the one place that knows the layout of the result files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from wardround.errors import JournalError, StudyError
from wardround.study.yaml_text import parse_yaml

MINUS = "\N{MINUS SIGN}"
NO_BREAK = "\N{NO-BREAK SPACE}"
AGGREGATES = ("mean", "unseen")
SMALL_N = 10
SATURATION_LIMIT = 1e-4

Kind = Literal["baseline", "local", "federated", "pooled", "other"]


@dataclass(frozen=True)
class Metric:
    """How one metric is named, rounded and compared; `negligible` is a difference not worth a claim."""

    name: str
    label: str
    unit: str = ""
    larger_is_better: bool = True
    decimals: int = 3
    negligible: float = 0.001
    definition: str = "as the task defines it"

    def show(self, value: float) -> str:
        """The value, rounded, without its unit."""
        if not math.isfinite(value):
            return "∞" if value > 0 else f"{MINUS}∞"
        return f"{value:.{self.decimals}f}".replace("-", MINUS)

    def amount(self, value: float) -> str:
        """The value with its unit, or with the metric's label where it has none."""
        return f"{self.show(value)}{NO_BREAK}{self.unit or self.label}"

    def difference(self, value: float) -> str:
        """A signed difference, rounded, without its unit; what rounds to nothing has no sign."""
        text = self.show(abs(value))
        if not text.strip("0."):
            return text
        return f"{'+' if value > 0 else MINUS}{text}"

    def signed(self, value: float) -> str:
        """A signed difference with its unit, or with the metric's label where it has none."""
        return f"{self.difference(value)}{NO_BREAK}{self.unit or self.label}"

    def printed(self, gain: float) -> float:
        """A gain (positive is better) in the metric's own direction: a better NMSE is negative."""
        return gain if self.larger_is_better else -gain

    def span(self, gains: tuple[float, float]) -> str:
        """The interval of a gain as signed differences in the metric's own direction."""
        low, high = sorted(self.printed(end) for end in gains)
        return f"{self.difference(low)} to {self.difference(high)}"

    def gain(self, value: float, reference: float) -> float:
        """How much better `value` is than `reference`: positive is better whatever the metric's direction."""
        return value - reference if self.larger_is_better else reference - value


def _windowed(name: str, window: str, ends: str) -> Metric:
    definition = f"peak signal-to-noise ratio in the {window} window ({ends})"
    return Metric(name, f"PSNR, {window}", "dB", True, 2, 0.05, definition)


_KNOWN_METRICS = (
    Metric("psnr", "PSNR", "dB", True, 2, 0.05, "peak signal-to-noise ratio over the whole image"),
    Metric("ssim", "SSIM", "", True, 3, 0.001, "structural similarity over the whole image, at most 1"),
    Metric("nmse", "NMSE", "", False, 4, 0.0002, "squared error relative to the image's energy, 0 is perfect"),
    Metric("rmse_hu", "RMSE", "HU", False, 1, 0.5, "root of the mean squared error over the whole image"),
    Metric("rmse_hu_body", "RMSE in the body", "HU", False, 1, 0.5, "root of the mean squared error inside the body"),
    _windowed("psnr_lung", "lung", "−1350 to 150 HU, range 1500 HU"),
    _windowed("psnr_soft", "soft tissue", "−160 to 240 HU, range 400 HU"),
)
_SMALLER_IS_BETTER = frozenset({"nmse", "mse", "rmse", "mae", "nrmse", "loss", "hd95", "ece", "brier", "lpips"})


def metric_of(name: str) -> Metric:
    """The display rules of a metric by its name in result.json; unknown names get plain rules."""
    for known in _KNOWN_METRICS:
        if name == known.name:
            return known
        if name == f"{known.name}_head":
            definition = known.definition.replace("over the whole image", "inside the head").replace(
                "to the image's energy", "to the image's energy inside the head"
            )
            return Metric(
                name,
                f"{known.label} in the head",
                known.unit,
                known.larger_is_better,
                known.decimals,
                known.negligible,
                definition,
            )
    return Metric(name, name.replace("_", " "), "", name.split("_")[0] not in _SMALLER_IS_BETTER)


@dataclass(frozen=True)
class Arm:
    """One way of getting a model, or none: its key in result.json, its name in print, its style."""

    key: str
    label: str
    kind: Kind
    style: str
    description: str = ""


_KNOWN_ARMS = {
    arm.key: arm
    for arm in (
        Arm(
            "zero_filled",
            "Zero-filled",
            "baseline",
            "zero-filled",
            "no reconstruction: missing samples are zero",
        ),
        Arm("fbp", "FBP", "baseline", "zero-filled", "filtered back projection, nothing learned"),
        Arm("cg_sense", "CG-SENSE", "baseline", "cg-sense", "least squares with coil maps, nothing learned"),
        Arm("tv", "TV", "baseline", "tv", "total variation: compressed sensing, nothing learned"),
        Arm("weighted_tv", "Weighted TV", "baseline", "cg-sense", "total variation, rays weighted by their photons"),
        Arm("local", "Alone", "local", "local", "each site trains on its own patients, evaluated at that site"),
        Arm("federated", "Together", "federated", "federated", "federated: scans stay, sums of updates travel"),
        Arm("pooled", "Pooled", "pooled", "pooled", "all data in one place: the ideal that privacy forbids"),
    )
}
_ARM_ORDER: tuple[Kind, ...] = ("baseline", "local", "federated", "other", "pooled")


def arm_of(key: str, unknown_index: int = 0) -> Arm:
    """The arm of a key; unknown keys are shown under their own name with one of four spare styles."""
    if key in _KNOWN_ARMS:
        return _KNOWN_ARMS[key]
    style = f"other-{unknown_index % 4}"
    if key == "baseline":
        return Arm(key, "Baseline", "baseline", style, "nothing learned")
    return Arm(key, key.replace("_", " "), "other", style)


@dataclass(frozen=True)
class Estimate:
    """A mean over test patients with its bootstrap interval; `n` counts patients."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval's ends, or None where none was computed."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def _finite(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def estimate_of(entry: object) -> Estimate | None:
    """An estimate from its JSON form, or None for null, for NaN and for anything that is no estimate."""
    entry = _mapping(entry)
    value = _number(entry.get("value"))
    if value is None:
        return None
    n = _finite(entry.get("n"))
    return Estimate(value, _finite(entry.get("ci_low")), _finite(entry.get("ci_high")), None if n is None else int(n))


@dataclass(frozen=True)
class Round:
    """One line of rounds.jsonl."""

    arm: str
    number: int
    attempt: int = 0
    participants: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    loss: float | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    saturated_share: float = 0.0


def _round_of(line: Mapping[str, Any]) -> Round:
    validation = {name: _finite(value) for name, value in _mapping(line.get("validation")).items()}
    return Round(
        arm=str(line["arm"]),
        number=int(line["round"]),
        attempt=int(line.get("attempt") or 0),
        participants=tuple(str(site) for site in line.get("participants") or ()),
        missing={str(site): str(reason) for site, reason in _mapping(line.get("missing")).items()},
        loss=_finite(line.get("loss")),
        validation={name: value for name, value in validation.items() if value is not None},
        bytes_up=int(line.get("bytes_up") or 0),
        bytes_down=int(line.get("bytes_down") or 0),
        seconds=float(line.get("seconds") or 0.0),
        saturated_share=_finite(line.get("saturated_share")) or 0.0,
    )


@dataclass(frozen=True)
class Run:
    """Everything a report says about one run directory."""

    folder: Path
    result: Mapping[str, Any]
    rounds: tuple[Round, ...]
    study_text: str
    study: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.result.get("study") or self.study.get("name") or "unnamed study")

    @cached_property
    def _metrics(self) -> Mapping[str, Any]:
        return _mapping(self.result.get("metrics"))

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """Arms in reading order, from baselines to pooled; `baseline` as an alias is left out."""
        baseline = self._metrics.get("baseline")
        is_alias = any(key != "baseline" and table == baseline for key, table in self._metrics.items())
        unknown = [key for key in self._metrics if key not in _KNOWN_ARMS and not (key == "baseline" and is_alias)]
        known = [_KNOWN_ARMS[key] for key in _KNOWN_ARMS if key in self._metrics]
        arms = known + [arm_of(key, index) for index, key in enumerate(unknown)]
        return tuple(sorted(arms, key=lambda arm: _ARM_ORDER.index(arm.kind)))

    def arm(self, kind: Kind) -> Arm | None:
        """The first arm of a kind (the plain one before its variants)."""
        return next((arm for arm in self.arms if arm.kind == kind), None)

    @cached_property
    def training(self) -> tuple[str, ...]:
        """Sites that train, in the study's order."""
        declared = [
            site
            for site, entry in _mapping(self.study.get("sites")).items()
            if _mapping(entry).get("role", "train") == "train"
        ]
        participants = [str(site) for site in self.result.get("participants") or ()]
        return tuple(dict.fromkeys([*declared, *participants]))

    @cached_property
    def unseen(self) -> tuple[str, ...]:
        """Sites that are evaluated only."""
        named = [
            key
            for table in self._metrics.values()
            for key, entry in _mapping(table).items()
            if key not in AGGREGATES and not isinstance(entry, str)
        ]
        declared = [str(site) for site in _mapping(self.study.get("sites"))]
        return tuple(site for site in dict.fromkeys([*declared, *named]) if site not in self.training)

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites: those that train, then those that are evaluated only."""
        return self.training + self.unseen

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of any arm and site, best-known first; the first one answers the study's question."""
        names = dict.fromkeys(
            name for table in self._metrics.values() for entry in _mapping(table).values() for name in _mapping(entry)
        )
        order = [known.name for known in _KNOWN_METRICS]
        order += [f"{name}_head" for name in order]
        first = [name for name in order if name in names]
        return tuple(metric_of(name) for name in dict.fromkeys([*first, *names]))

    def estimate(self, arm: str, site: str, metric: str) -> Estimate | None:
        """The estimate of an arm at a site (or `mean`, `unseen`), or None."""
        return estimate_of(_mapping(_mapping(self._metrics.get(arm)).get(site)).get(metric))

    def withheld(self, arm: str, site: str) -> str | None:
        """Why a site's numbers are not here, or None where nobody withheld them."""
        table = _mapping(self._metrics.get(arm))
        if _mapping(table.get(site)):
            return None
        reason = _mapping(self.result.get("withheld")).get(site)
        return str(reason) if reason else None

    def paired_gain(self, arm: str, reference: str, site: str, metric: str) -> Estimate | None:
        """The bootstrap of a paired difference: `gains[arm][reference][site][metric]`, positive is better."""
        table = _mapping(_mapping(_mapping(self.result.get("gains")).get(arm)).get(reference))
        return estimate_of(_mapping(table.get(site)).get(metric))

    @cached_property
    def left_out(self) -> Mapping[str, Mapping[str, Any]]:
        """Per left-out site: `federated` trained without it, and `best_local` of the others."""
        return {site: _mapping(entry) for site, entry in _mapping(self.result.get("left_out")).items()}

    def history(self, arm: str) -> tuple[Round, ...]:
        """The rounds of an arm in order, the last attempt of each."""
        last: dict[int, Round] = {}
        for entry in self.rounds:
            if entry.arm == arm and (entry.number not in last or entry.attempt >= last[entry.number].attempt):
                last[entry.number] = entry
        return tuple(last[number] for number in sorted(last))

    def selected_round(self, arm: str) -> int | None:
        """The round whose model was released, where the run says so."""
        value = _mapping(self.result.get("selected_round")).get(arm)
        return value if isinstance(value, int) else None

    def patients(self, site: str) -> int | None:
        """Test patients behind a site's numbers: the most of any arm and metric."""
        counts = [
            found.n
            for arm in self.arms
            for metric in self.metrics
            if (found := self.estimate(arm.key, site, metric.name)) is not None and found.n is not None
        ]
        return max(counts, default=None)

    def acquisition(self, site: str) -> Mapping[str, Any]:
        """The simulated protocol of a site: its own, or the study's."""
        own = _mapping(_mapping(self.study.get("sites")).get(site)).get("acquisition")
        return _mapping(own) or _mapping(self.study.get("acquisition"))

    @property
    def secure(self) -> bool:
        """Whether updates were summed under masks."""
        return bool(_mapping(self.result.get("privacy")).get("secure"))

    @property
    def privacy(self) -> Mapping[str, Any]:
        """What differential privacy cost; empty where nothing was noised, even if sums were masked."""
        said = _mapping(self.result.get("privacy"))
        return {} if said.get("epsilon", ...) is None else said

    @property
    def simulated(self) -> Literal["mri", "ct"] | None:
        """Which acquisition a reconstruction's raw data are simulated by; None for tasks of another kind."""
        if _mapping(self.study.get("task")).get("kind", "reconstruction") != "reconstruction":
            return None
        kinds = {self.acquisition(site).get("kind") for site in self.sites}
        return "ct" if kinds == {"ct"} else "mri"


def load_run(out: Path) -> Run:
    """Reads result.json, rounds.jsonl and study.yaml; the last two may be absent.

    Raises `JournalError` where result.json is missing or a file is not what its name says.
    """
    path = out / "result.json"
    if not path.is_file():
        raise JournalError("no result.json in the run directory: finish the run first", detail=str(out))
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise JournalError("result.json is not JSON: run again or resume", detail=str(path)) from error
    if not isinstance(result, dict):
        raise JournalError("result.json is not a JSON object: run again or resume", detail=str(path))
    study_path = out / "study.yaml"
    text = study_path.read_text(encoding="utf-8") if study_path.is_file() else ""
    try:
        study = _mapping(parse_yaml(text, "study.yaml"))
    except StudyError as error:
        raise JournalError("study.yaml in the run directory is not YAML", detail=str(study_path)) from error
    return Run(out, result, _read_rounds(out / "rounds.jsonl"), text, study)


def _read_rounds(path: Path) -> tuple[Round, ...]:
    lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()
    rounds: list[Round] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rounds.append(_round_of(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(lines):  # a stopped run may leave half a line behind
                break
            raise JournalError(f"line {number} of rounds.jsonl is no round: resume rebuilds it") from error
    return tuple(rounds)

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
from wardround.report.metrics import Metric, metrics_in
from wardround.study.yaml_text import parse_yaml

AGGREGATES = ("mean", "unseen")
SMALL_N = 10
# Fewer patients give no interval, whatever a file says.
LEAST_N = 5
SATURATION_LIMIT = 1e-4

Kind = Literal["baseline", "local", "federated", "pooled", "other"]


def site_title(key: str) -> str:
    """A site's name, or the words for an aggregate of sites."""
    return {"mean": "Mean of training sites", "unseen": "Left-out institutions"}.get(key, key)


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
        Arm("tv_real", "TV, real image", "baseline", "other-2", "total variation of a real image, nothing learned"),
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
    """A mean over test patients with its 95% interval; `n` counts patients."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval's ends, or None where none was computed, and where patients are too few for one."""
        few = self.n is not None and self.n < LEAST_N
        return None if few or self.low is None or self.high is None else (self.low, self.high)


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
    saturated: float = 0.0


def _saturated(line: Mapping[str, Any]) -> float:
    """The largest share of a tensor's values that were cut off; of all values where a run counted those alone."""
    told = line.get("saturated")
    shares = [_finite(share) for share in told.values()] if isinstance(told, Mapping) else [_finite(told)]
    return max((share for share in shares if share is not None), default=_finite(line.get("saturated_share")) or 0.0)


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
        saturated=_saturated(line),
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
        """The task's metrics that any arm and site has, in its order; the first one answers the study's question."""
        names = {
            name for table in self._metrics.values() for entry in _mapping(table).values() for name in _mapping(entry)
        }
        return tuple(metric for metric in metrics_in(self.result) if metric.name in names) if names else ()

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
        """A paired difference: `gains[arm][reference][site][metric]`, positive is better."""
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
        """The simulated protocol of a site: its own, or the study's; empty for a task without scanners."""
        if self.simulated is None:
            return {}
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
        sites, common = _mapping(self.study.get("sites")), _mapping(self.study.get("acquisition"))
        own = [_mapping(_mapping(sites.get(site)).get("acquisition")) or common for site in self.sites]
        return "ct" if {acquisition.get("kind") for acquisition in own} == {"ct"} else "mri"


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
    run = Run(out, result, _read_rounds(out / "rounds.jsonl"), text, study)
    try:
        run.metrics  # noqa: B018 - read once, here
    except ValueError as error:
        raise JournalError(
            "result.json does not say how its metrics are read (metric_specs), as an earlier version wrote it: run the "
            "study again in another folder",
            detail=str(path),
        ) from error
    return run


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

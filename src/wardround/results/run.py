"""A run directory as typed, read-only values: its result, its rounds, its study."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from wardround.results.files import read_result, read_rounds
from wardround.results.metrics import MetricInfo
from wardround.results.schema import Compared, Measured, Result, RoundLine
from wardround.results.units import flat
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.load import UNREAD, load_study
from wardround.study.registry import BASELINES, baseline
from wardround.study.schema import Study
from wardround.study.update import PARENT

SMALL_N = 10
SATURATION_LIMIT = 1e-4
WITHHELD = "withheld by the site"
FAILED = "could not be measured"

Kind = Literal["baseline", "local", "federated", "pooled", "other"]


def site_title(key: str, *, trained: bool = True) -> str:
    """A site's name, or the words for an aggregate of sites; `trained` is whether the run trained anything."""
    of_mean = "Mean of training sites" if trained else "Mean of sites"
    return {"mean": of_mean, "unseen": "Left-out institutions"}.get(key, key)


def trained(measured: Measured) -> bool:
    """Whether a run trained anything; numbers that were measured again do not say it, and count as if it had."""
    return not (isinstance(measured, Result) and measured.rounds == 0)


@dataclass(frozen=True)
class ShownArm:
    """One way of getting a model, or none: its key in result.json, its name in print, its style."""

    key: str
    label: str
    kind: Kind
    style: str
    description: str = ""


# In reading order, behind the baselines; unknown arms stand before the last.
_TRAINED = (
    ShownArm("local", "Alone", "local", "local", "each site trains on its own patients, evaluated at that site"),
    ShownArm("federated", "Together", "federated", "federated", "federated: scans stay, sums of updates travel"),
    ShownArm(
        "finetuned",
        "Fine-tuned",
        "other",
        "other-1",
        "each site goes on alone from the model trained together, and keeps what comes of it",
    ),
    ShownArm("pooled", "Pooled", "pooled", "pooled", "all data in one place: the ideal that privacy forbids"),
)
# What stands in place of the federation's model where nothing was trained.
_GIVEN = ShownArm(
    "federated", "Given model", "federated", "federated", "the model that the study starts from: nothing was trained"
)
# The release that a study continues, as it was.
_PARENT = ShownArm(
    PARENT, "Release before", "other", "other-1", "the release that the study continues, on the same test patients"
)
_ARM_ORDER: tuple[Kind, ...] = ("baseline", "local", "federated", "other", "pooled")


@cache
def _known_arms() -> tuple[ShownArm, ...]:
    own = ((name, baseline(name)) for name in BASELINES)
    return (*(ShownArm(name, b.label, "baseline", b.style, b.description) for name, b in own), *_TRAINED, _PARENT)


def arm_of(key: str, unknown_index: int = 0, outside: Compared | None = None) -> ShownArm:
    """The arm of a key, the baseline of a package `outside`; others are shown under their key with a spare style."""
    if known := next((arm for arm in _known_arms() if arm.key == key), None):
        return known
    style = f"other-{unknown_index % 4}"
    if outside is not None:
        return ShownArm(key, outside.label, "baseline", style, outside.description)
    if key == "baseline":
        return ShownArm(key, "Baseline", "baseline", style, "nothing learned")
    return ShownArm(key, key.replace("_", " "), "other", style)


def arms_in_order(keys: Iterable[str]) -> tuple[ShownArm, ...]:
    """The arms of keys in reading order, where no result says more of them."""
    arms = [arm_of(key, index) for index, key in enumerate(keys)]
    return tuple(sorted(arms, key=lambda arm: _ARM_ORDER.index(arm.kind)))


def arms_of(measured: Measured) -> tuple[ShownArm, ...]:
    """The arms of a result in reading order."""
    given = {} if trained(measured) else {_GIVEN.key: _GIVEN}
    known = [given.get(arm.key, arm) for arm in _known_arms() if arm.key in measured.arms]
    unknown = [key for key in measured.arms if key not in [arm.key for arm in known]]
    arms = known + [arm_of(key, index, measured.baselines.get(key)) for index, key in enumerate(unknown)]
    return tuple(sorted(arms, key=lambda arm: _ARM_ORDER.index(arm.kind)))


def arms_in(measured: Measured, metric: MetricInfo) -> tuple[ShownArm, ...]:
    """The arms without those that have values of other metrics alone: there is no outline of a classical image."""
    of_others = {arm for arm, _, _, _ in measured.estimates()} - _with(measured, metric)
    return tuple(arm for arm in arms_of(measured) if arm.key not in of_others)


def leading(measured: Measured) -> tuple[MetricInfo, ...]:
    """The first metric and, where no baseline has a value of it, the first that one of them has."""
    first = measured.measured[:1]
    baselines = {arm.key for arm in arms_of(measured) if arm.kind == "baseline"}
    if not baselines or any(baselines & _with(measured, metric) for metric in first):
        return first
    return first + tuple(m for m in measured.measured if baselines & _with(measured, m))[:1]


def _with(measured: Measured, metric: MetricInfo) -> set[str]:
    """The arms that have a value of a metric anywhere."""
    return {arm for arm, _, name, _ in measured.estimates() if name == metric.name}


@dataclass(frozen=True)
class Unmeasured:
    """What to say in place of numbers, and the reason."""

    text: str
    reason: str


@dataclass(frozen=True)
class Run:
    """Everything a report says about one run directory."""

    folder: Path
    result: Result
    rounds: tuple[RoundLine, ...]
    study: Study
    study_text: str

    @cached_property
    def arms(self) -> tuple[ShownArm, ...]:
        """Arms in reading order."""
        return arms_of(self.result)

    def arms_in(self, metric: MetricInfo) -> tuple[ShownArm, ...]:
        """The arms to show a metric of."""
        return arms_in(self.result, metric)

    def arm(self, kind: Kind) -> ShownArm | None:
        """The first arm of a kind (the plain one before its variants)."""
        return next((arm for arm in self.arms if arm.kind == kind), None)

    @property
    def trained(self) -> bool:
        """Whether anything was trained; else the model that the study starts from was measured."""
        return trained(self.result)

    @property
    def training(self) -> tuple[str, ...]:
        """Sites that train, in the study's order."""
        return self.study.training_sites

    @property
    def averaged(self) -> tuple[str, ...]:
        """Sites that means are over: those that train; where none does, all with patients of their own."""
        return self.study.averaged_sites

    @property
    def evaluating(self) -> tuple[str, ...]:
        """Sites that do not train, and on whose validation patients, among others, the round was chosen."""
        return self.study.evaluating_sites

    def role(self, site: str) -> str:
        """What a site does, in words."""
        if not self.trained:
            on = "all its patients" if site in self.unseen else "its test patients"
            return f"measured on {'the test patients of others' if self.study.sites[site].scans else on}"
        if site in self.evaluating:
            chose = self.study.schedule.release == "best"
            return "does not train; its validation patients count" + (" in the choice of the round" if chose else "")
        return "trains" if site in self.training else "evaluated only"

    @property
    def unseen(self) -> tuple[str, ...]:
        """Sites that are only tested, after training."""
        return self.study.unseen_sites

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites: those that train, then those that only validate and test, then those that are only tested."""
        return self.study.member_sites + self.evaluating + self.unseen

    def history(self, arm: str) -> tuple[RoundLine, ...]:
        """The rounds of an arm in order."""
        return tuple(line for line in self.rounds if line.arm == arm)

    @cached_property
    def federated_history(self) -> tuple[RoundLine, ...]:
        """The rounds of the federated arm."""
        return self.history("federated")

    @cached_property
    def saturated(self) -> tuple[RoundLine, ...]:
        """The rounds of any arm that lost values of a tensor to the range of their integers."""
        return tuple(line for line in self.rounds if line.saturated > SATURATION_LIMIT)

    def patients(self, site: str) -> int | None:
        """Test patients behind a site's numbers: the most of any arm and metric."""
        return self._most.get(site)

    @cached_property
    def _most(self) -> dict[str, int]:
        most: dict[str, int] = {}
        for _, site, _, found in self.result.estimates():
            most[site] = max(found.n, most.get(site, 0))
        return most

    @cached_property
    def hidden(self) -> frozenset[str]:
        """Sites whose numbers and pictures stay: where numbers stay, pictures stay."""
        return frozenset((*self.result.withheld, *self.result.failed))

    def unmeasured(self, arm: str, site: str) -> Unmeasured | None:
        """Why an arm has no numbers at a site; None where it has some, or the run knows of no reason."""
        if self.result.metrics.get(arm, {}).get(site):
            return None
        for text, reasons in ((WITHHELD, self.result.withheld), (FAILED, self.result.failed)):
            if site in reasons:
                return Unmeasured(text, reasons[site])
        return None

    @property
    def scanner(self) -> AcquisitionSettings | None:
        """How a task's raw data come about; None for tasks without scanners."""
        return self.study.scanner if self.study.task.scanner == "needed" else None

    def acquisition(self, site: str) -> AcquisitionSettings | None:
        """The protocol of a site; None for a task without scanners."""
        return self.study.acquisition_of(site) if self.scanner is not None else None

    @property
    def secure(self) -> bool:
        """Whether updates were summed under masks."""
        return self.result.privacy is not None and self.result.privacy.secure

    @property
    def spent(self) -> tuple[tuple[str, str], ...]:
        """What differential privacy cost, by name; nothing where nothing was noised, even if sums were masked."""
        privacy = self.result.privacy
        return () if privacy is None or privacy.epsilon is None else tuple(flat(privacy.model_dump()))

    @property
    def hashes(self) -> tuple[tuple[str, str], ...]:
        """The hashes of study and models, by name."""
        frozen = () if self.result.frozen_sha256 is None else ("frozen_sha256",)
        keys = ("study_sha256", "plan_sha256", "model_sha256", *frozen, "local_sha256")
        found = self.result.model_dump(include=set(keys))
        return tuple(flat({key: found[key] for key in keys}))


def load_run(out: Path) -> Run:
    """Reads result.json, rounds.jsonl and study.yaml.

    Raises `JournalError` where result.json is missing or a file of the two is not what its name says, and `StudyError`
    for the study.
    """
    result = read_result(out)
    path = out / "study.yaml"
    return Run(out, result, read_rounds(out), load_study(path, reading=UNREAD), path.read_text(encoding="utf-8"))

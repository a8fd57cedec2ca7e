"""What a run writes: `result.json` and the lines of `rounds.jsonl`, as frozen values.

docs/results.md holds the JSON schemas. A name here is a key that other programs read: changing or removing one takes
another `version`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainSerializer, PrivateAttr, WithJsonSchema, model_validator

from wardround.results.metrics import MetricInfo
from wardround.study.base import Config
from wardround.study.protocols import HeaderFacts
from wardround.tasks.estimates import LEAST_PATIENTS

AGGREGATES = ("mean", "unseen")
# The name of the first baseline's table once more, for programs that know no baseline by its own.
ALIAS = "baseline"

_Rounded = Annotated[float, AfterValidator(lambda value: round(value, 6))]
# An accountant may find no bound, and JSON has no infinity.
_Epsilon = Annotated[
    float,
    Field(allow_inf_nan=True),
    PlainSerializer(lambda value: value if math.isfinite(value) else "Infinity", when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "Infinity"}]}),
]
_Count = Annotated[int, Field(ge=0)]


class Estimate(Config):
    """A metric over `n` test patients, or the paired difference of two arms; no interval below 5 patients."""

    value: _Rounded
    n: _Count = Field(description="patients that the value is of")
    se: _Rounded | None = Field(None, description="standard error; `null` where there is no interval")
    ci_low: _Rounded | None = Field(None, description="lower end of the 95% interval")
    ci_high: _Rounded | None = Field(None, description="upper end of the 95% interval")
    absent: _Count = Field(
        0, exclude_if=lambda count: count == 0, description="patients without a value; not written where 0"
    )

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval's ends, or None where none was computed, and where patients are too few for one."""
        if self.n < LEAST_PATIENTS or self.ci_low is None or self.ci_high is None:
            return None
        return self.ci_low, self.ci_high


# By metric; a metric that no patient has a value of is `null`.
Row = dict[str, Estimate | None]
# By site, `mean` (patients, then site, then unweighted training sites, or all sites where none trains) and `unseen`;
# `null` where there are no numbers.
Table = dict[str, Row | None]


class LeftOut(Config):
    """What a training site gets that one federation left out."""

    federated: Row | None = Field(description="the model that the other sites trained together")
    best_local: Row | None = Field(None, description="the best of the other sites' own models, chosen with hindsight")


class GroupTables(Config):
    """Results on the test patients of one group of a column that sites declare in their own files."""

    column: str
    group: str = Field(description="`other` holds those whom no other group has, and small groups")
    metrics: dict[str, Table] = Field(
        description="by arm, as in `metrics`; `mean` where every training site gave the group"
    )

    def estimate(self, arm: str, site: str, metric: str) -> Estimate | None:
        """The estimate of an arm at a site (or `mean`), or None where there is none."""
        return _cell(self.metrics.get(arm), site, metric)

    def estimates(self) -> Iterator[tuple[str, str, str, Estimate]]:
        """Arm, site, metric and estimate of every number."""
        for arm in self.metrics:
            yield from _of_arm(arm, self.metrics[arm])


class Compared(Config):
    """A classical method that the models are compared with."""

    label: str
    description: str


Cell = str | float | None


class Part(Config):
    """What the task says of its results: plain text, and a table where there is a `head`."""

    title: str = Field(max_length=200)
    text: str = Field("", max_length=10_000)
    head: tuple[str, ...] = Field((), max_length=30)
    rows: tuple[tuple[Cell, ...], ...] = Field((), max_length=1000)

    @model_validator(mode="after")
    def _rows_fit(self) -> Part:
        if any(len(row) != len(self.head) for row in self.rows):
            raise ValueError(f"the table {self.title!r} has rows that are not of its {len(self.head)} columns")
        return self

    @property
    def cells(self) -> tuple[tuple[str, ...], ...]:
        """The rows as text."""
        return tuple(tuple(_text(cell) for cell in row) for row in self.rows)


def _text(cell: Cell) -> str:
    return "–" if cell is None else cell if isinstance(cell, str) else f"{cell:.6g}"


class GateEntry(Config):
    """What a site says of the new model by a metric, against the release that the study continues."""

    gain: _Rounded | None = Field(None, description="paired difference in the metric's unit, positive for better")
    ci_low: _Rounded | None = Field(None, description="lower end of its 95% interval")
    ci_high: _Rounded | None = Field(None, description="upper end of its 95% interval")
    n: _Count = Field(0, description="test patients of the site that both models were measured on")
    margin: float = Field(description="how much worse the new model may be, in the metric's unit")
    verdict: Literal["not worse", "worse", "insufficient evidence"] = Field(
        description="`not worse`: `ci_low` lies above minus the margin; `worse`: `ci_high` lies below it"
    )
    why: str = Field("", description="where evidence is insufficient: why")


class Gate(Config):
    """Whether the new model takes the place of the release that the study continues: only where no site loses."""

    promoted: bool = Field(description="whether every entry is `not worse`")
    sites: dict[str, dict[str, GateEntry]] = Field(description="by site and metric")
    reason: str = Field(description="which sites stand against it, and why; or that none does")


class Measured(Config):
    """What the models of a run gave on test patients."""

    metric_specs: tuple[MetricInfo, ...] = Field(description="in the task's order; the first answers the question")
    metrics: dict[str, Table] = Field(
        description="by arm: `federated`, `local`, `pooled`, `baseline`, each baseline, and `parent`, the release "
        "that a study with `update` continues"
    )
    baselines: dict[str, Compared] = Field({}, description="by arm: what each baseline is; it learns nothing")
    gains: dict[str, dict[str, Table]] = Field(
        description="by arm and reference arm: paired differences, positive where the arm is better"
    )
    left_out: dict[str, LeftOut] = Field(description="by training site, where each was left out once")
    elsewhere: dict[str, Table] = Field(
        {},
        exclude_if=lambda tables: not tables,
        description="by training site: its own model (arm `local/SITE`) at every site, itself included; not written "
        "where no site was trained alone, and under `protection.secure`, where such a model stays at its site",
    )
    withheld: dict[str, str] = Field(description="by site: the rule of the site that keeps its numbers")
    failed: dict[str, str] = Field(description="by site: why it could not be measured")
    parts: tuple[Part, ...] = Field((), description="what the task itself says of these numbers")
    gate: Gate | None = Field(
        None,
        exclude_if=lambda gate: gate is None,
        description="of a study with `update`: whether the new model takes the place of the release",
    )
    groups: tuple[GroupTables, ...] = Field((), description="by column and group, where sites declare columns")
    groups_missing: dict[str, str] = Field(
        {}, description="by site: why results by a column that it declares are not in `groups`"
    )

    def estimate(self, arm: str, site: str, metric: str) -> Estimate | None:
        """The estimate of an arm at a site (or `mean`, `unseen`), or None where there is none.

        >>> found = read_result("out").estimate("federated", "Alpha", "psnr")
        >>> found.n, found.interval
        (1, None)
        """
        return _cell(self.metrics.get(arm), site, metric)

    def gain(self, arm: str, reference: str, site: str, metric: str) -> Estimate | None:
        """The paired difference of two arms at a site (or `mean`), or None where there is none."""
        return _cell(self.gains.get(arm, {}).get(reference), site, metric)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that have a table, without the alias `baseline`."""
        alias = self.metrics.get(ALIAS) in [table for arm, table in self.metrics.items() if arm != ALIAS]
        return tuple(arm for arm in self.metrics if not (arm == ALIAS and alias))

    def estimates(self) -> Iterator[tuple[str, str, str, Estimate]]:
        """Arm, site, metric and estimate of every number, in the order of the tables."""
        for arm in self.arms:
            yield from _of_arm(arm, self.metrics[arm])

    def crossed(self) -> Iterator[tuple[str, str, str, Estimate]]:
        """The site whose own model it is, the site that tested it, metric and estimate of every number."""
        for trained, table in self.elsewhere.items():
            yield from _of_arm(trained, table)

    @property
    def measured(self) -> tuple[MetricInfo, ...]:
        """The metrics that any arm has anywhere, in the task's order."""
        names = {name for _, _, name, _ in self.estimates()}
        return tuple(metric for metric in self.metric_specs if metric.name in names)


def _of_arm(arm: str, table: Table) -> Iterator[tuple[str, str, str, Estimate]]:
    for site, row in table.items():
        yield from ((arm, site, name, found) for name, found in (row or {}).items() if found is not None)


def _cell(table: Table | None, site: str, metric: str) -> Estimate | None:
    return ((table or {}).get(site) or {}).get(metric)


class Sizes(Config):
    """Bytes by what they hold."""

    base: _Count = Field(0, description="values that the study never changes: sites have them, and none is sent")
    model: _Count = Field(0, description="shared values of the model, and what a method sends beside them")
    adapters: _Count = Field(0, description="what the study's `adapters` add, and what a method folds")
    metrics: _Count = Field(0, description="sums of losses, seconds and metrics, and results of tests")
    side_channels: _Count = Field(0, description="what a method tells of the part that stays at a site")
    other: _Count = Field(
        0, description="headers, scales, weights, counts; keys and shares of a secure sum; the model's card"
    )

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(count for _, count in self)


class Bill(Config):
    """Bytes of messages, header and body as the wire has them."""

    up: Sizes = Field(Sizes(), description="from the sites")
    down: Sizes = Field(Sizes(), description="to the sites")


class ArmBill(Config):
    """What the messages of an arm weigh, of all sites."""

    rounds: Bill = Field(Bill(), description="all rounds with their validations; the sum of `bill` in `rounds.jsonl`")
    tests: Bill = Field(
        Bill(),
        description="everything outside rounds, mostly tests (those of baselines are the federation's), by the process "
        "that finished the run",
    )


class Traffic(Config):
    """Bytes of the federated arm, all rounds and sites; and the bill of every arm by kind."""

    bytes_up: _Count = Field(description="from the sites")
    bytes_down: _Count = Field(description="to the sites")
    arms: dict[str, ArmBill] = Field({}, description="by arm")
    study: Bill = Field(
        Bill(),
        description="of the study as a whole: facts, spending, results by group, and the delivery of the released "
        "model (not its answers, which come after this file)",
    )


class Started(Config):
    """What the model of every arm began with, as the study fixes it."""

    kind: Literal["fresh", "weights", "release"] = "fresh"
    sha256: str | None = Field(None, description="of the weights file, or the `model_sha256` of the release")


class Seconds(Config):
    """Wall-clock seconds."""

    total: float = Field(description="the whole run, all arms")
    training: float = Field(description="of which training at the sites")
    overhead: float = Field(description="of which moving, checking and adding updates")


class SitePrivacy(Config):
    """What a site spent and under which terms."""

    delta: float
    epsilon: _Epsilon = Field(description="of this study; `Infinity` where the accountant finds no bound")
    epsilon_ledger: _Epsilon = Field(description="of everything in the site's ledger")
    noise_multiplier: float
    sample_rate: float
    steps: _Count


class PrivacyStatement(Config):
    """What protected the updates and what it cost; noise has a `unit`, masks alone have none."""

    accountant: str | None = None
    budget: float | None = Field(None, description="the epsilon at which a site stops")
    epsilon: _Epsilon | None = Field(None, description="the largest of the sites; `null` without noise")
    noise: str | None = None
    note: str | None = Field(None, description="what is promised, and what is not")
    preset: str | None = None
    secure: bool = Field(description="whether updates were summed under masks")
    sites: dict[str, SitePrivacy] = Field({}, description="those with a budget")
    unit: Literal["patient"] | None = None


class Result(Measured):
    """A finished run: everything that its `result.json` holds, as attributes."""

    version: Literal[1] = 1
    study: str = Field(description="the study's name")
    study_sha256: str = Field(description="over what the study's file says")
    plan_sha256: str = Field(description="over the resolved study: all defaults of this version filled in")
    model_sha256: str = Field(
        description="over the shared tensors of the released federated model, and `frozen_sha256` where there is one"
    )
    start: Started = Started()
    frozen_sha256: str | None = Field(
        None, description="over the values that the study freezes, stored once: weights/FROZEN_SHA256.safetensors"
    )
    local_sha256: dict[str, str] = Field(description="by site: over the tensors that stay there")
    scanners: dict[str, HeaderFacts] = Field(description="by site: what headers say, where the site lets it out")
    rounds: _Count = Field(description="`0`: nothing was trained, and `federated` is the model that `start` names")
    participants: tuple[str, ...] = Field(
        description="sites that took part in any federated round; none of a run of 0 rounds"
    )
    compare: tuple[str, ...]
    patients: dict[str, dict[Literal["train", "validation", "test"], int | None] | None] = Field(
        description="by site and split; `null` where the site's rules keep a small number"
    )
    set_aside: dict[str, int | None] = Field(
        {},
        description="by site: patients whose files cannot be used, who are in no other number; `null` where the "
        "site's rules keep a small number",
    )
    traffic: Traffic
    seconds: Seconds
    privacy: PrivacyStatement | None = Field(description="`null` where updates were neither noised nor masked")
    steps: dict[str, _Count] = Field(
        description="by arm: optimiser steps of a site, all rounds; not where a round is `local.passes`"
    )
    examples: dict[str, _Count] = Field(
        description="by arm: training examples, all rounds and sites; not where a round is `local.passes`"
    )
    selected_round: dict[str, _Count] = Field(
        description="by arm: the round whose model was released; `0`: as it was given"
    )
    fingerprint: dict[str, str] = Field(description="software and machine")
    notes: tuple[str, ...] = Field(description="what a reader must know of single rounds")

    _out: Path = PrivateAttr(default=Path())

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self._out

    @property
    def report(self) -> Path:
        """The report."""
        return self._out / "report.html"

    @property
    def values(self) -> dict[str, Any]:
        """What `result.json` holds, as JSON values."""
        return self.model_dump(mode="json")

    def lying_in(self, out: Path) -> Result:
        """The same result, with the folder where its files are."""
        found = self.model_copy()
        found._out = out
        return found

    def metric(self, arm: str, site: str = "mean", name: str | None = None) -> float:
        """A metric's value, of the task's first one without a name; raises `KeyError` for one that was not measured.

        >>> result = read_result("out")
        >>> result.metric("federated") == result.metric("federated", "mean", result.metric_specs[0].name)
        True
        >>> result.metric("federated", "Alpha", "speed")
        Traceback (most recent call last):
        KeyError: 'the run has no speed of federated at Alpha'
        """
        name = name or self.metric_specs[0].name
        found = self.estimate(arm, site, name)
        if found is None:
            raise KeyError(f"the run has no {name} of {arm} at {site}")
        return found.value

    def __repr__(self) -> str:
        return f"<Result of {self.study}, {self.rounds} rounds: {', '.join(self.arms)}; {self.report}>"

    __str__ = __repr__


class RoundLine(Config):
    """A line of `rounds.jsonl`, one for each committed round of every arm: none of its numbers is from one patient."""

    arm: str = Field(description="`federated`, `pooled`, `local/SITE`, `without/SITE`")
    round: int = Field(ge=1)
    attempt: _Count
    participants: tuple[str, ...]
    missing: dict[str, str] = Field(description="by site: why it did not take part")
    loss: float | None
    validation: dict[str, float] | None = Field(description="by metric, over the sites in `validated`")
    bytes_up: _Count
    bytes_down: _Count
    seconds: float
    coordinator_seconds: float
    training_seconds: float
    saturated_share: float = Field(description="of all values of updates, those that were cut off")
    saturated: float = Field(description="the same of the tensor that has most of them")
    state_sha256: str
    notes: tuple[str, ...] = ()
    validated: tuple[str, ...] = ()
    bill: Bill = Field(Bill(), description="`bytes_up` and `bytes_down` by kind")
    staleness: dict[str, int] = Field(
        {},
        description="of asynchronous rounds: by participant, how many rounds older than the newest the state was that "
        "its update trained from",
    )
    at_work: dict[str, int] = Field(
        {},
        description="of asynchronous rounds: by site that was still at work when the round was committed, the round "
        "that it was asked for",
    )

"""The gate: a new model takes the place of the release that it came of only where no site loses.

At each site the new model and the release are measured on the same test patients. The interval of their paired
difference decides (a test of non-inferiority): its lower end must lie above minus the margin. All sites must pass, so
the number of sites makes no wrong promotion more likely, and no correction for several tests is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wardround.results.metrics import MetricInfo
from wardround.results.schema import Gate, GateEntry, Measured
from wardround.study.update import PARENT
from wardround.tasks.estimates import LEAST_PATIENTS

CANDIDATE = "federated"
NOT_WORSE, WORSE, INSUFFICIENT = "not worse", "worse", "insufficient evidence"
# By the first part of a metric's name, else by its unit: how much worse a model may be where a study says nothing.
_MARGINS = {"dice": 0.02, "psnr": 0.1, "auroc": 0.01}
_MARGINS_BY_UNIT = {"dB": 0.1}


def default_margin(metric: MetricInfo) -> float:
    """0.02 of Dice, 0.1 dB, 0.01 of AUROC; of other metrics twice the difference that makes no claim."""
    named = _MARGINS.get(metric.name.partition("_")[0])
    found = _MARGINS_BY_UNIT.get(metric.unit) if named is None else named
    return 2.0 * metric.negligible if found is None else found


def margins_of(given: Mapping[str, float], metrics: Sequence[MetricInfo]) -> dict[str, float]:
    """By metric, in the task's order, the margins of a gate: the task's first metric, and those that a study names."""
    return {
        metric.name: given.get(metric.name, default_margin(metric))
        for number, metric in enumerate(metrics)
        if number == 0 or metric.name in given
    }


def gate_of(measured: Measured, sites: Sequence[str], margins: Mapping[str, float]) -> Gate:
    """Whether the new model may take the place of the release, and what each of `sites` says by each metric.

    `margins` are in the metrics' units, by metric. A site whose numbers are withheld, missing, of other patients or of
    too few for an interval gives insufficient evidence, and then nothing is promoted.
    """
    entries = {site: {name: _entry(measured, site, name, margins[name]) for name in margins} for site in sites}
    metrics = {metric.name: metric for metric in measured.metric_specs}
    against = [
        f"{site} ({metrics[name].label}: {entry_words(metrics[name], entry)})"
        for verdict in (WORSE, INSUFFICIENT)
        for site, of_site in entries.items()
        for name, entry in of_site.items()
        if entry.verdict == verdict
    ]
    if not against:
        return Gate(promoted=True, sites=entries, reason=f"not worse at any of {len(entries)} sites")
    return Gate(promoted=False, sites=entries, reason="; ".join(against))


def _entry(measured: Measured, site: str, name: str, margin: float) -> GateEntry:
    mine, theirs = measured.estimate(CANDIDATE, site, name), measured.estimate(PARENT, site, name)
    gain = measured.gain(CANDIDATE, PARENT, site, name)
    why = _missing(measured, site)
    if not why and (mine is None or theirs is None or gain is None):
        why = "the site gave no value of one of the two models"
    if why or mine is None or theirs is None or gain is None:
        return GateEntry(margin=margin, verdict=INSUFFICIENT, why=why)
    found = GateEntry(gain=gain.value, n=gain.n, margin=margin, verdict=INSUFFICIENT)
    if mine.n + mine.absent != theirs.n + theirs.absent:
        why = f"the new model was measured on {mine.n + mine.absent} patients and the release on other patients"
        return found.model_copy(update={"why": f"{why} ({theirs.n + theirs.absent})"})
    interval = gain.interval
    if interval is None:
        few = gain.n < LEAST_PATIENTS
        why = f"fewer than {LEAST_PATIENTS} test patients" if few else "the site gave no interval"
        return found.model_copy(update={"why": why})
    low, high = interval
    verdict = NOT_WORSE if low > -margin else WORSE if high < -margin else INSUFFICIENT
    why = "the interval holds differences on both sides of the margin" if verdict == INSUFFICIENT else ""
    return found.model_copy(update={"ci_low": low, "ci_high": high, "verdict": verdict, "why": why})


def _missing(measured: Measured, site: str) -> str:
    """Why there is nothing of a site, in its own words."""
    if site in measured.withheld:
        return f"withheld by the site: {measured.withheld[site]}"
    return f"could not be measured: {measured.failed[site]}" if site in measured.failed else ""


def entry_words(metric: MetricInfo, entry: GateEntry) -> str:
    """What a site says by a metric, in a few words, in the metric's own direction."""
    if entry.ci_low is None or entry.ci_high is None or entry.gain is None:
        return f"{entry.verdict}, {entry.why}"
    change = metric.difference(metric.printed(entry.gain))
    within = f"{change}, interval {metric.span((entry.ci_low, entry.ci_high))}, margin {metric.show(entry.margin)}"
    return f"{entry.verdict}, {within}"

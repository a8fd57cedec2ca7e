"""The answer to "was it worth training together?" in plain sentences, as plain when it was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wardround.results.metrics import MetricInfo
from wardround.results.run import Run, ShownArm, leading
from wardround.results.schema import Estimate
from wardround.results.units import in_rounds

Verdict = Literal["better", "same", "worse", "unknown"]


@dataclass(frozen=True)
class Gain:
    """The difference of two arms at a site; `gain` is positive where `arm` is better, in the metric's units.

    `paired` is the paired difference with its interval, where the run computed it.
    """

    site: str
    value: float
    reference: float
    gain: float
    n: int | None
    paired: Estimate | None = None


@dataclass(frozen=True)
class Answer:
    """The headline, what qualifies it, and its verdict."""

    verdict: Verdict
    headline: str
    details: tuple[str, ...] = ()


def _gain(run: Run, metric: MetricInfo, arm: str, reference: str, site: str) -> Gain | None:
    mine, other = run.result.estimate(arm, site, metric.name), run.result.estimate(reference, site, metric.name)
    if mine is None or other is None:
        return None
    paired = run.result.gain(arm, reference, site, metric.name)
    return Gain(site, mine.value, other.value, metric.gain(mine.value, other.value), mine.n, paired)


def site_gains(run: Run, metric: MetricInfo, arm: str, reference: str) -> tuple[Gain, ...]:
    """The gain of an arm over another at every training site that shows both."""
    found = (_gain(run, metric, arm, reference, site) for site in run.averaged)
    return tuple(gain for gain in found if gain is not None)


def mean_gain(run: Run, metric: MetricInfo, arm: str, reference: str) -> Gain | None:
    """The unweighted mean gain over training sites: over those that show both arms where a site withholds."""
    gains = site_gains(run, metric, arm, reference)
    whole = _gain(run, metric, arm, reference, "mean")
    if whole is not None and (not gains or len(gains) == len(run.averaged)):
        return whole
    if not gains:
        return None
    count = len(gains)
    value, other = sum(g.value for g in gains) / count, sum(g.reference for g in gains) / count
    return Gain("mean", value, other, metric.gain(value, other), None)


def verdict_of(metric: MetricInfo, gain: Gain) -> Verdict:
    """Better or worse only where the difference is worth a claim and no paired interval holds 0."""
    interval = gain.paired.interval if gain.paired else None
    if abs(gain.gain) < metric.negligible or (interval and interval[0] <= 0.0 <= interval[1]):
        return "same"
    return "better" if gain.gain > 0 else "worse"


def best_baseline(run: Run, metric: MetricInfo, site: str = "mean") -> tuple[ShownArm, float] | None:
    """The best arm that learned nothing, and its value."""
    found = [
        (arm, estimate.value)
        for arm in run.arms
        if arm.kind == "baseline" and (estimate := run.result.estimate(arm.key, site, metric.name)) is not None
    ]
    sign = 1.0 if metric.larger_is_better else -1.0
    return max(found, key=lambda pair: sign * pair[1], default=None)


@dataclass(frozen=True)
class Unseen:
    """How the federated model does at institutions whose data it never saw, against the best of a kind."""

    where: str
    value: float
    against: str = ""
    gain: float | None = None


def left_out_gains(run: Run, metric: MetricInfo) -> tuple[Gain, ...]:
    """Per left-out site: the model trained without it against the best model of one other site."""
    gains = []
    for site, entry in run.result.left_out.items():
        mine, other = (entry.federated or {}).get(metric.name), (entry.best_local or {}).get(metric.name)
        if mine is not None and other is not None:
            gain = metric.gain(mine.value, other.value)
            gains.append(Gain(site, mine.value, other.value, gain, mine.n))
    return tuple(gains)


def unseen_result(run: Run, metric: MetricInfo, arm: str) -> Unseen | None:
    """The result at institutions that did not take part: left out in turn, or of role `unseen`."""
    whole = run.result.estimate(arm, "unseen", metric.name)
    where = "institutions that did not take part"
    gains = left_out_gains(run, metric)
    if gains:
        value = whole.value if whole else sum(gain.value for gain in gains) / len(gains)
        gain = sum(gain.gain for gain in gains) / len(gains)
        return Unseen(where, value, "the best model of a single site", gain)
    sites = [site for site in run.unseen if run.result.estimate(arm, site, metric.name)]
    key = "unseen" if whole else (sites[0] if len(sites) == 1 else "")
    if not key:
        return None
    if key != "unseen":
        where = f"{key}, which did not take part"
    mine = run.result.estimate(arm, key, metric.name)
    assert mine is not None
    other = run.result.estimate("local", key, metric.name)
    if other is not None:
        return Unseen(where, mine.value, "models trained alone", metric.gain(mine.value, other.value))
    baseline = best_baseline(run, metric, key)
    if baseline is not None:
        gain = metric.gain(mine.value, baseline[1])
        return Unseen(where, mine.value, f"the best baseline ({baseline[0].label})", gain)
    return Unseen(where, mine.value)


def _extremes(metric: MetricInfo, gains: Sequence[Gain]) -> str:
    """How many sites gained and lost, by the bare difference where it is not negligible, and the worst of them."""
    if len(gains) < 2:
        return f" (one site, {gains[0].site})" if gains else ""
    worst = min(gains, key=lambda gain: gain.gain)
    gained = sum(gain.gain >= metric.negligible for gain in gains)
    lost = sum(gain.gain <= -metric.negligible for gain in gains)
    text = f"{gained} of {len(gains)} hospitals gained" + (f", {lost} lost" if lost else "")
    return f" ({text}; worst site {metric.signed(metric.printed(worst.gain))})"


def _against_alone(metric: MetricInfo, mean: Gain, gains: Sequence[Gain]) -> tuple[Verdict, str]:
    verdict, amount = verdict_of(metric, mean), metric.amount(abs(mean.gain))
    signed = metric.signed(metric.printed(mean.gain))
    average = " on average" if len(gains) != 1 else ""
    tail = _extremes(metric, gains)
    if verdict == "better":
        did = f"gained +{amount} over" if metric.larger_is_better else f"improved on ({signed})"
        return verdict, f"Training together {did} training alone{average}{tail}"
    if verdict == "worse":
        lost = f"it lost {amount} against" if metric.larger_is_better else f"it was worse ({signed}) than"
        return verdict, f"Training together did not help: {lost} training alone{average}{tail}"
    return verdict, f"Training together made no clear difference to training alone: {signed}{average}{tail}"


def _against_pooled(metric: MetricInfo, mean: Gain) -> str:
    verdict = verdict_of(metric, mean)
    if verdict == "same":
        return "is level with pooling the data"
    side = "short of" if verdict == "worse" else "ahead of"
    return f"is {metric.amount(abs(mean.gain))} {side} pooling the data"


def _at_unseen(metric: MetricInfo, unseen: Unseen) -> str:
    text = f"at {unseen.where}, it reaches {metric.amount(unseen.value)}"
    if unseen.gain is None:
        return text
    if abs(unseen.gain) < metric.negligible:
        return f"{text}, level with {unseen.against}"
    words = "better" if unseen.gain > 0 else "worse"
    return f"{text}, {metric.amount(abs(unseen.gain))} {words} than {unseen.against}"


def answer(run: Run) -> Answer:
    """The headline and its qualifications for the study's first metric."""
    together, alone, pooled = run.arm("federated"), run.arm("local"), run.arm("pooled")
    if not run.result.measured:
        about = "training together" if run.trained else "the given model"
        return Answer("unknown", f"This run holds no metrics, so it says nothing about {about}.")
    metric = run.result.measured[0]
    if together is None:
        return Answer("unknown", "This run has no federated arm, so it says nothing about training together.")
    mean = mean_gain(run, metric, together.key, alone.key) if alone else None
    details: list[str] = []
    verdict: Verdict
    if not run.trained:
        verdict, text = "unknown", _of_given(run, metric, together)
        details.append(f"Measured was what the study names: {run.study.start.describe()}.")
    elif mean is None or alone is None:
        own = run.result.estimate(together.key, "mean", metric.name)
        reached = f": it reached {metric.amount(own.value)} on average" if own else ""
        verdict = "unknown"
        text = f"Training together was not compared with training alone{reached}"
    else:
        gains = site_gains(run, metric, together.key, alone.key)
        verdict, text = _against_alone(metric, mean, gains)
        if gains and len(gains) < len(run.training):
            details.append(f"Over the {len(gains)} of {len(run.training)} training sites that publish both arms.")
        if mean.paired and mean.paired.interval:
            details.append(
                f"The paired difference is {metric.signed(metric.printed(mean.paired.value))} "
                f"(95% interval {metric.span(mean.paired.interval)})."
            )
    to_pooled = mean_gain(run, metric, together.key, pooled.key) if pooled else None
    if to_pooled is not None:
        joint = " and " if verdict in ("better", "unknown") else "; it "
        text += joint + _against_pooled(metric, to_pooled)
    unseen = unseen_result(run, metric, together.key) if run.trained else None
    if unseen is not None:
        text += "; " + _at_unseen(metric, unseen)
    compared = leading(run.result)[-1]
    baseline = _best_rival(run, compared, together)
    if compared != metric and baseline is not None:
        details.append(_of_images(run, compared, together, alone, *baseline))
    elif baseline is not None and baseline[1].gain <= -metric.negligible:
        arm, gain = baseline
        text += f"; but {arm.label}, which learns nothing, is {metric.amount(-gain.gain)} ahead of the network"
    elif baseline is not None:
        details.append(_over_baseline(metric, *baseline))
    details += _recovered(metric, mean, to_pooled)
    return Answer(verdict, f"{text}.{_saturated(run)}", tuple(details))


def _of_given(run: Run, metric: MetricInfo, given: ShownArm) -> str:
    """What a model that was only measured reached, and where it is worst."""
    found = [(e.value, site) for site in run.averaged if (e := run.result.estimate(given.key, site, metric.name))]
    whole = run.result.estimate(given.key, "mean", metric.name)
    text = "Nothing was trained: the given model"
    if not found:
        return f"{text} has no {metric.label} of any hospital"
    if len(found) == 1:
        return f"{text} reached {metric.amount(found[0][0])} at {found[0][1]}"
    best, worst = sorted(found, key=lambda pair: pair[0], reverse=metric.larger_is_better)[:: len(found) - 1]
    if whole is None:
        span = f"{metric.amount(worst[0])} ({worst[1]}) to {metric.amount(best[0])} ({best[1]})"
        return f"{text} reached {span} at {len(found)} of {len(run.averaged)} hospitals"
    return f"{text} reached {metric.amount(whole.value)} on average at {len(found)} hospitals (worst: {worst[1]}, " + (
        f"{metric.amount(worst[0])})"
    )


def _of_images(
    run: Run, metric: MetricInfo, together: ShownArm, alone: ShownArm | None, rival: ShownArm, over_rival: Gain
) -> str:
    """What the first metric that baselines have says of the arms, where it is not the first."""
    own = run.result.estimate(together.key, "mean", metric.name)
    text = f"{metric.label}" + (f": {metric.amount(own.value)}{' together' if run.trained else ''}" if own else "")
    over_alone = mean_gain(run, metric, together.key, alone.key) if alone else None
    pairs = [("training alone", over_alone), (f"the best method without learning, {rival.label}", over_rival)]
    said = [f"{metric.signed(metric.printed(gain.gain))} against {whom}" for whom, gain in pairs if gain is not None]
    return f"{text}, {', '.join(said)}."


def arm_words(run: Run, key: str) -> str:
    """An arm of rounds.jsonl in words: of a shared model, of a site alone, or of a model without one site."""
    known = {arm.key: arm.label for arm in run.arms}
    group, _, site = key.partition("/")
    return known.get(key) or f"{ {'local': 'Alone at', 'without': 'Without'}.get(group, group) } {site}".strip()


def _saturated(run: Run) -> str:
    """Which arms lost something to the range of their integers: it may have cost them, and so the comparison."""
    found: dict[str, list[int]] = {}
    for line in run.saturated:
        found.setdefault(line.arm, []).append(line.round)
    if not found:
        return ""
    worst = max(line.saturated for line in run.saturated)
    named = [f"{arm_words(run, arm)} ({in_rounds(numbers)})" for arm, numbers in found.items()]
    arms = ", ".join(named) if len(named) <= 3 else f"{', '.join(named[:3])} and {len(named) - 3} more arms"
    return f" Mind: values of updates were cut off in {arms}, at worst {worst:.2%}; that may have cost them accuracy."


def _recovered(metric: MetricInfo, mean: Gain | None, to_pooled: Gain | None) -> list[str]:
    if mean is None or to_pooled is None:
        return []
    possible = mean.gain - to_pooled.gain
    if possible < 4 * metric.negligible or mean.gain <= 0:  # a share of next to nothing would mislead
        return []
    share = 100 * mean.gain / possible
    if share >= 100:
        return []
    return [f"That is {share:.0f}% of what pooling all data would have gained over training alone."]


def _best_rival(run: Run, metric: MetricInfo, together: ShownArm) -> tuple[ShownArm, Gain] | None:
    """The best arm that learned nothing, and the network's gain over it, at the training sites that show both."""
    rivals = [arm for arm in run.arms if arm.kind == "baseline"]
    found = [(arm, gain) for arm in rivals if (gain := mean_gain(run, metric, together.key, arm.key)) is not None]
    return min(found, key=lambda pair: pair[1].gain, default=None)


def _over_baseline(metric: MetricInfo, arm: ShownArm, gain: Gain) -> str:
    name = f"the best method without learning, {arm.label} ({metric.amount(gain.reference)})"
    if abs(gain.gain) < metric.negligible:
        return f"It is level with {name}."
    return f"It is {metric.amount(gain.gain)} better than {name}."

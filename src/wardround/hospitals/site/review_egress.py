"""The part of a review that says what leaves a hospital: each group of values and metric, how exact, and how much."""

from __future__ import annotations

from collections.abc import Iterator

from wardround.federation.expected import Expected
from wardround.federation.measuring import REFERENCE
from wardround.learning.training import patients_in
from wardround.plan.arm_specs import ArmSpec
from wardround.results.units import human_bytes, human_seconds
from wardround.runs.columns import entry, table, wrapped
from wardround.runs.explain import also_of_parent, beside_words, early_end, facts_words, unmasked_lines
from wardround.runs.explain_groups import group_lines
from wardround.runs.explain_shift import statistics_words
from wardround.runs.machine import Machine
from wardround.runs.outlook import BANDWIDTHS, bits_of
from wardround.runs.statement import words
from wardround.study.tasks import ReconstructionTask
from wardround.tasks.task import Dataset, MetricSpec, Split


def leaves(host: Machine, arm_spec: ArmSpec, site: str, dataset: Dataset | None) -> str:
    """When what leaves, to the coordinator alone."""
    trains, role = site in host.study.training_sites, host.study.sites[site].role
    lines = [entry("at the start", facts_words(host))]
    lines += [entry("before round 1", said)] if (said := statistics_words(host, site)) else []
    if trains:
        lines += _rounds(host, arm_spec)
    if host.study.trains and role in ("train", "evaluate"):
        lines += _validated(host, site, dataset)
    lines += [entry("at the end", _at_the_end(host, site, dataset))]
    if dataset is not None:
        lines += [entry("by group", line) for line in group_lines(host)]
    lines += [entry("scanners", _scanners(host, site)), entry("beside these", beside_words(host))]
    kinds = ["local"] * bool(arm_spec.policy.names("local")) + ["own"] * bool(arm_spec.own)
    stays = f"; what the table calls {' and '.join(kinds)}" if kinds and trains else ""
    lines += [entry("never", f"images, raw data, pictures, names, paths, dates{stays}")]
    least = host.egress(site).least
    whatever = "; an update leaves whatever their number" if trains else ""
    note = f"(No count and no result of fewer than {least} patients leaves{whatever}.)"
    lines += [wrapped(note, "  ")]
    return "\n".join(lines)


def _scanners(host: Machine, site: str) -> str:
    """What headers of images say of the scanners."""
    study = host.study
    headed = isinstance(study.task, ReconstructionTask) and study.scanner.headers
    if not study.trains or not headed or study.protection.privacy is not None or not host.egress(site).scanner_facts:
        return "nothing of them leaves"
    return (
        "which of them, tube voltages, slice thicknesses and kernels the headers of the training images name, as sets, "
        "for the released model's file; site.yaml allows it (egress.scanner_facts)"
    )


def _rounds(host: Machine, arm_spec: ArmSpec) -> Iterator[str]:
    """Every group of values in an update, with the values of the model that are in none."""
    yield entry("every round", "how the shared values changed, times this hospital's weight, and the weight:")
    sent = arm_spec.codec.sent(arm_spec.layout)
    side = arm_spec.kinds.side_channels
    rows = []
    for group in sent.groups:
        bits = sent.bits_of(group)
        what = "side channel" if group.name in side else "integers"
        exact = f"{what} of {group.ring_bits} bits, {bits} for the value: 1 part in {2 ** (bits - 1):,} of its range"
        rows.append((group.name, str(len(group.tensors)), f"{group.size:,}", exact))
    sizes = {p.name: p.info.size for p in host.model_context.parameters}
    policy = arm_spec.policy
    for kind, held, stays in (
        ("local", policy.names("local"), "stay at this hospital"),
        ("frozen", policy.names("frozen"), "never change, and are in no message"),
        ("own", arm_spec.own, "of this hospital's own model, beside the shared one: stay at this hospital"),
    ):
        if held:
            rows.append((kind, str(len(held)), f"{sum(sizes[name] for name in held):,}", stays))
    yield table(("group", "tensors", "values", "how exact"), rows)
    yield wrapped("A value is rounded at random to a neighbouring step, so that sums are right on average.", "  ")
    for tensors in ([tensor.name for tensor in group.tensors] for group in sent.groups):
        if tensors:
            shown = ", ".join(tensors[:_SHOWN]) + (
                f" and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else ""
            )
            yield wrapped(f"Tensors: {shown}.", "  ")
    yield from unmasked_lines(host)
    if discloses := arm_spec.method.discloses:
        yield entry("", discloses)
    loss = "the seconds it took" if host.study.protection.privacy is not None else "its loss and the seconds it took"
    yield entry("", f"and, as entries of the same update, {loss}")


def _validated(host: Machine, site: str, dataset: Dataset | None) -> Iterator[str]:
    """Sums over validation patients."""
    every = host.study.schedule.validate_every
    if not every or not host.task.metrics:
        return
    when = "every round" if every == 1 else f"every {every} rounds"
    why = _withheld(host, site, "validation", dataset)
    if why is not None:
        yield entry("validation", f"nothing of validation patients leaves: {why}")
        return
    yield entry("validation", f"{when}, sums over this hospital's validation patients of:")
    yield table(_METRICS, [_metric(spec) for spec in host.task.metrics])


def _at_the_end(host: Machine, site: str, dataset: Dataset | None) -> str:
    rules = host.egress(site)
    if not rules.per_site_results:
        return "nothing of test patients: site.yaml keeps this hospital's own results (egress.per_site_results)"
    why = _withheld(host, site, "test", dataset)
    if why is not None:
        return f"nothing of test patients leaves: {why}"
    names = ", ".join(spec.name for spec in host.task.metrics)
    return (
        f"the number of test patients; of {names} the mean, its standard error, and that of the difference to "
        f"{REFERENCE}, rounded to the metric's step; of every model that is "
        f"{'trained' if host.study.trains else 'measured'}{also_of_parent(host)}"
    )


def _withheld(host: Machine, site: str, split: Split, dataset: Dataset | None) -> str | None:
    """Why sums over a part of the patients stay; nothing where they leave, or where the data are not open."""
    if dataset is None:
        return None
    values = {spec.name: range(dataset.patients(split)) for spec in host.task.metrics}
    return host.egress(site).refusal(values)


_METRICS = ("metric", "range", "in steps of", "what")
_SHOWN = 12


def _metric(spec: MetricSpec) -> tuple[str, str, str, str]:
    unit = f" {spec.unit}" if spec.unit else ""
    return spec.name, f"{spec.low:g} to {spec.high:g}{unit}", f"{spec.resolution:g}", spec.label or spec.definition


def traffic(host: Machine, bill: Expected, site: str) -> str:
    """Bytes of a round and of the whole study, and how long they take on lines of some speeds."""
    study, role = host.study, host.study.sites[site].role
    schedule, of_round = study.schedule, bill.of_round(role)
    # Each model that is trained with this hospital's updates has rounds like those of the federation's.
    models = [arm.name for arm in host.arms.values() if site in arm.sites and not arm.inside(study)]
    more = max(len(models) - 1, 0) * schedule.rounds * (of_round.down.total + of_round.up.total)
    total = bill.in_all(role, schedule.rounds, schedule.validate_every) + more
    rows = [
        (what, human_bytes(down), human_bytes(up), *(human_seconds(8 * (down + up) / bits_of(s)) for s in BANDWIDTHS))
        for what, down, up in (
            ("a round", of_round.down.total, of_round.up.total),
            ("the tests", bill.tests.down.total, bill.tests.up.total),
        )
    ]
    of_each = f" of each of {len(models)} models" if len(models) > 1 else ""
    speeds = ", ".join(f"{human_seconds(8 * total / bits_of(speed))} at {speed}" for speed in BANDWIDTHS)
    rows = rows if study.trains else rows[1:]
    over = f"over {schedule.rounds} rounds{of_each} and the tests" if study.trains else "for the tests"
    lines = [
        table(("", "to here", "from here", *(f"at {speed}" for speed in BANDWIDTHS)), rows),
        entry("in all", f"{human_bytes(total)} {over}: {speeds}"),
    ]
    if not study.trains:
        return "\n".join(lines)
    kinds = [f"{kind.replace('_', ' ')} {human_bytes(count)}" for kind, count in vars(of_round.up).items() if count]
    lines += [entry("of a round", f"from here: {', '.join(kinds)}")] if kinds else []
    if bill.secure:
        lines.append(entry("", "keys and shares of the secure sum come on top: some kB a round"))
    return "\n".join(lines)


def protected(host: Machine, site: str, dataset: Dataset | None) -> str:
    """Who can read what leaves, and what it says of a patient at most."""
    study, rules = host.study, host.study.protection.privacy
    if not study.trains:
        seen = "there are none: nothing is trained"
    elif study.protection.secure:
        seen = (
            "masked: the coordinator learns the sum over the hospitals and nothing of this one (secure aggregation); "
            "test results at the end are not masked"
        )
    elif study.protection.robust is not None:
        seen = "in the clear: the coordinator reads each hospital's, to leave out what a malicious one sends"
    else:
        seen = "in the clear: the coordinator adds the updates up, and could read this hospital's"
    lines = [entry("updates", seen), entry("on the way", "encrypted, between the coordinator and this hospital alone")]
    if rules is None:
        what = "an update" if study.trains else "a result"
        lines.append(entry("patients", f"no differential privacy: {what} is not noised, and no epsilon bounds it"))
        return "\n".join(lines)
    lines.append(entry("patients", f"differential privacy, unit one patient; {rules.preset}. {words(rules)}"))
    if study.sites[site].role != "train":
        lines.append(entry("cost", "none: this hospital does not train, and spends nothing"))
    elif dataset is None:
        lines.append(entry("cost", "not known while the data cannot be opened"))
    else:
        outlook = host.agent(site).held.budgets.outlook(site, dataset)
        spent = "no ledger of earlier studies" if outlook.spent is None else f"{outlook.spent:.2f} spent before"
        lines.append(
            entry(
                "cost",
                f"epsilon {outlook.planned:.2f} of a budget of {outlook.terms.epsilon:g} (delta "
                f"{outlook.terms.delta:.2g}) for {patients_in(dataset)['train']} training patients; {spent}",
            )
        )
        if line := early_end(outlook):
            lines.append(entry("", line))
    return "\n".join(lines)

"""What a study would do, in plain words, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from wardround.federation.measuring import REFERENCE
from wardround.learning.training import patients_in
from wardround.plan.arm_specs import ArmSpec
from wardround.plan.arms import FEDERATED
from wardround.plan.sums import LOSS
from wardround.results.gate import margins_of
from wardround.results.metrics import MetricInfo
from wardround.results.units import human_bytes, protocol
from wardround.runs.columns import WIDTH, entry, table, wrapped
from wardround.runs.explain_given import given_traffic, measuring_lines
from wardround.runs.explain_groups import group_lines
from wardround.runs.explain_plugins import roles_of, uncalled
from wardround.runs.explain_shift import statistics_words
from wardround.runs.machine import NOWHERE, Machine
from wardround.runs.remarks import remarks_on, remarks_on_baselines, remarks_on_given
from wardround.runs.session import open_host
from wardround.runs.statement import words
from wardround.site.budgets import Outlook
from wardround.site.quarantine import summary
from wardround.study.base import at
from wardround.study.load import load_study
from wardround.study.protection import Rotation, Subspace, TopK
from wardround.study.schema import Local, Study
from wardround.study.sites import SiteData, SitesFile, load_sites
from wardround.study.tasks import ReconstructionTask
from wardround.tasks.estimates import LEAST_PATIENTS
from wardround.tasks.task import Headed, Split
from wardround.wire.ring import value_bits
from wardround.wire.tensors import table_of


def explain(
    study_file: Path,
    sites_file: Path | None,
    compare: Sequence[str],
    overrides: Sequence[str],
    *,
    allow_code: bool = False,
) -> str:
    """Sites, what is learned, arms, what travels and how much of it; with a sites file also every site's patients.

    Reads the study and the data, writes nothing. Code that the study names is called where the sites file allows it, or
    with `allow_code`: without either it says that, and what can be said all the same. Raises `StudyError` and
    `DataError` for whatever would stop the run.
    """
    study, near = load_study(study_file, overrides), study_file.parent
    if sites_file is None:
        nowhere = SitesFile(sites={name: SiteData(data=(Path(),)) for name in study.sites})
        host = open_host(study, nowhere, NOWHERE, compare, (), None, allow_code=allow_code, near=near)
        if (text := uncalled(host)) is not None:
            return text
        sites, mind = _sites(host), "Data: not looked at; add --sites SITES to see every site's patients."
    else:
        read = load_sites(sites_file)
        host = open_host(study, read, NOWHERE, compare, (), None, allow_code=allow_code, near=near)
        sites, mind = _sites_with_data(host), "\n".join(_cautions(host))
    arm_spec = host.arm_spec("federated")
    sections = (
        study_lines(host, arm_spec),
        f"Sites\n{sites}",
        f"{'Training' if study.trains else 'Measuring'}\n{training_lines(host, arm_spec)}\n{_traffic(host, arm_spec)}",
        _scanners(study),
        f"Arms\n{arms_lines(host)}" if study.trains else "",
        f"What leaves a site\n{_egress(host, arm_spec, with_data=sites_file is not None)}",
        _privacy(host, with_data=sites_file is not None),
        mind,
    )
    return "\n\n".join(section for section in sections if section)


def full_study(study_file: Path, overrides: Sequence[str]) -> str:
    """The study as YAML with overrides applied and every default filled in. Raises `StudyError`."""
    study = load_study(study_file, overrides)
    return str(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=WIDTH)).rstrip()


def study_lines(host: Machine, arm_spec: ArmSpec) -> str:
    """What is learned, with which model and method, from which start."""
    study = host.study
    sizes = {p.name: p.info.size for p in host.model_context.parameters}
    parts = {role: sum(sizes[name] for name in arm_spec.policy.names(role)) for role in ("shared", "local", "frozen")}
    meaning = {"shared": "shared", "local": "stay at each site", "frozen": "never change"}
    roles = ", ".join(f"{count:,} {meaning[role]}" for role, count in parts.items() if count)
    entries = [
        entry("study_sha256", host.study_sha256),
        entry("plan_sha256", host.plan_sha256),
        entry("learns", _task(study)),
        entry("model", f"{_model(study)}: {sum(sizes.values()):,} values"),
        entry("method", f"{study.method.describe()}: {roles}"),
        entry("start", study.start.describe()),
        *([entry("adapters", said)] if (said := study.adapters.describe()) else []),
        *([entry("forgets", study.forget.describe())] if study.forget is not None else []),
        *([entry("goes on", study.update.describe())] if study.update is not None else []),
    ]
    if study.description:
        entries.insert(0, entry("about", study.description))
    return "\n".join([f"Study {study.name}", *entries])


def _scans(study: Study) -> bool:
    """Whether it begins with raw data: simulated by scanners that the study describes, or measured."""
    return study.task.scanner == "needed"


def _scanner_head(study: Study) -> tuple[str, ...]:
    """How the table of sites calls their protocols; nothing where there are none."""
    return (("raw data" if study.scanner.measured else "simulated scanner"),) if _scans(study) else ()


def _model(study: Study) -> str:
    return study.model.describe()


def _scanner(study: Study, site: str) -> tuple[str, ...]:
    return (protocol(study.acquisition_of(site)),) if _scans(study) else ()


def _task(study: Study) -> str:
    task = study.task
    if not isinstance(task, ReconstructionTask):
        return task.describe()
    scanner = study.scanner
    masked = f" inside the {scanner.inside}" if task.loss.masked else ""
    size = f"{task.size[0]} x {task.size[1]} pixels"
    said = f"reconstruction of {scanner.subject(task.contrasts)}, {size}; loss {task.loss.kind}{masked}"
    return f"{said}{_without_truth(study)}"


def _without_truth(study: Study) -> str:
    """The training sites that learn from measured samples alone; nothing where all have true images."""
    alone = [site for site in study.training_sites if study.supervision_of(site).splits]
    if not alone:
        return ""
    where = "at every site" if len(alone) == len(study.training_sites) else f"at {', '.join(alone)}"
    return f"; without true images {where}: the loss is of measured samples that the network does not see"


def _sites(host: Machine) -> str:
    study = host.study
    rows = [(name, _role(study, name), *_scanner(study, name)) for name in study.sites]
    return table(("site", "role", *_scanner_head(study)), rows)


def _sites_with_data(host: Machine) -> str:
    study, rows = host.study, []
    for name in study.sites:
        dataset = host.dataset(name)
        counts = [str(count) for count in patients_in(dataset).values()]
        own = "leave the site" if _results_leave(host, name, dataset.patients("test")) else "stay there"
        rows.append((name, _role(study, name), *counts, str(len(dataset)), own, *_scanner(study, name)))
    header = ("site", "role", "train", "validation", "test", "examples", "own results", *_scanner_head(study))
    note = f"(train, validation, test: patients; examples: {'training slices' if _scans(study) else 'to train on'})"
    return f"{table(header, rows)}\n{wrapped(note, '  ')}"


def _withheld(host: Machine, site: str, patients: int) -> str | None:
    """Why a site's sums over so many patients will not leave it."""
    values = {spec.name: range(patients) for spec in host.task.metrics}
    return host.egress(site).refusal(values)


def _results_leave(host: Machine, site: str, patients: int) -> bool:
    """Whether sums over a site's test patients, so many, will leave it."""
    return host.egress(site).per_site_results and _withheld(host, site, patients) is None


def _role(study: Study, site: str) -> str:
    if study.sites[site].scans:
        return "unseen: others' test patients"
    lacks = study.sites[site].missing
    return roles_of(study)[study.sites[site].role] + (f", has no {', no '.join(lacks)}" if lacks else "")


def training_lines(host: Machine, arm_spec: ArmSpec) -> str:
    """Rounds, steps, and how an update is written; where nothing is trained, what is measured."""
    if not host.study.trains:
        return "\n".join(measuring_lines(host.study))
    study, local, schedule = host.study, host.study.local, host.study.schedule
    examples = f"{local.batch} example{'s' if local.batch != 1 else ''}"
    released = "the last"
    if schedule.release == "best" and host.task.metrics and schedule.validate_every:
        released = f"the one with the best validation {host.task.metrics[0].name}"
        if study.evaluating_sites:
            released += f", over the patients of {', '.join(study.evaluating_sites)} too"
    return "\n".join(
        (
            entry("a round", f"{_length(local)} of {examples} at every site; {local.optimizer}, lr {local.lr:g}"),
            *_passes(arm_spec),
            entry("rounds", f"{schedule.rounds}; released is {released}"),
            *(entry("asynchronous" if not i else "", line) for i, line in enumerate(late_lines(study))),
            *(entry("phase", stint.describe()) for stint in arm_spec.curriculum.stints),
            entry("an update", _update(study)),
        )
    )


def _length(local: Local) -> str:
    """How long a round is."""
    if local.passes is None:
        return f"{local.steps} steps"
    return f"{local.passes:g} pass{'' if local.passes == 1 else 'es'} over a site's own examples, in steps"


def _passes(arm_spec: ArmSpec) -> Iterator[str]:
    """The passes of a round, where there are several."""
    passes, local = arm_spec.method.passes(), arm_spec.arm.local
    steps = local.steps if local.passes is None else None
    for number, one in enumerate(passes if len(passes) > 1 else (), start=1):
        yield entry(f"pass {number}", one.describe(steps))


def late_lines(study: Study) -> tuple[str, ...]:
    """What rounds wait for, and what an update counts that comes late; nothing where they wait for all sites."""
    rules = study.schedule.asynchronous
    if rules is None:
        return ()
    count = len(study.training_sites)
    return (
        f"a round is committed with the first {rules.buffer} updates of {count} sites",
        f"one whose state is t rounds older counts (1 + t)^-{rules.exponent:g} of a fresh one (public), at most "
        f"{rules.max_staleness}",
        f"each site believes in up to {rules.max_staleness} rounds without it when it looks at a model",
    )


def _traffic(host: Machine, arm_spec: ArmSpec) -> str:
    """What the values of the model and its updates weigh; `wardround plan` counts whole messages."""
    study = host.study
    if not study.trains:
        return "\n".join(given_traffic(host, arm_spec))
    sent = arm_spec.codec.sent(arm_spec.layout)
    down = sum(info.nbytes for info in table_of(host.initial(arm_spec)[0]))
    up = arm_spec.codec.form.nbytes(sent)
    late = study.schedule.asynchronous
    total = study.schedule.rounds * (len(study.training_sites) if late is None else late.buffer) * (down + up)
    return "\n".join(
        (
            entry("traffic", f"a round, a site: {human_bytes(down)} down, {human_bytes(up)} up"),
            entry("", f"all rounds, all sites: {human_bytes(total)}"),
        )
    )


def _update(study: Study) -> str:
    protection, compression = study.protection, study.protection.compression
    bits = value_bits(protection.ring_bits, protection.max_sites)
    text = f"{protection.ring_bits}-bit integers: {bits} bits a value, so that {protection.max_sites} sites add up"
    match compression:
        case Rotation():
            return f"{text}; each tensor is rotated first"
        case Subspace():
            return f"{text}; {compression.ratio:.3g} of each tensor's rotated values, the rest waits at the site"
        case TopK():
            return f"{text}; the largest {compression.ratio:.3g} of each tensor's values, the rest waits at the site"
        case _:
            return text


def _scanners(study: Study) -> str:
    """What the simulated scanners take; nothing where they do not say it, and for a task of one's own."""
    costs = study.scanner.costs if _scans(study) else ""
    return str(at(costs)(study)) if costs else ""


def arms_lines(host: Machine) -> str:
    """What is trained beside the federation to compare with it, and with which patients."""
    if not host.study.trains:
        return "  none: schedule.rounds is 0"
    rounds = host.study.schedule.rounds
    rows = []
    for name, arm in host.arms.items():
        steps = host.arm_spec(name).steps * rounds
        passes = arm.local.passes and arm.local.passes * rounds
        data = ", ".join(arm.members) if len(arm.sites) == len(arm.members) else f"all of {', '.join(arm.members)}"
        counted = f"{steps:,}", f"{steps * arm.local.batch * len(arm.sites):,}"
        rows.append((name, *(counted if passes is None else (f"of {passes:g} passes",) * 2), data))
    notes = []
    baselines = host.study.baselines
    if baselines:
        notes.append(f"Compared with, nothing learned: {', '.join(baselines)}.")
    notes += [f"{remark[:1].upper()}{remark[1:]}." for remark in remarks_on_baselines(host.study)]
    notes += list(continued_lines(host))
    if len(rows) == 1:
        notes.append("Add --compare local,pooled to learn whether training together is worth it.")
    return "\n".join(
        [table(("arm", "steps a site", "examples in all", "data"), rows), *(f"  {note}" for note in notes)]
    )


def continued_lines(host: Machine) -> Iterator[str]:
    """What a study does that continues a release: with what it compares, and when the new model takes its place."""
    update, release = host.study.update, host.study.continues
    if update is None or release is None:
        return
    yield f"Continues the release {release}: every site measures it beside the new model, on the same test patients."
    metrics = [MetricInfo(**spec.to_json()) for spec in host.task.metrics]
    margins = margins_of(update.margins, metrics)
    units = {metric.name: f" {metric.unit}" if metric.unit else "" for metric in metrics}
    each = ", ".join(f"{name} {margin:g}{units[name]}" for name, margin in margins.items())
    yield f"The new model takes its place only where no site loses more than the margin: {each}."


def _egress(host: Machine, arm_spec: ArmSpec, *, with_data: bool) -> str:
    names = ", ".join(spec.name for spec in host.task.metrics)
    private = host.study.protection.privacy is not None
    seen = "the coordinator learns their sum over sites and nothing of any site"
    if not host.study.protection.secure:
        seen = "the coordinator only adds them up, but could read each: `protection.secure` is false"
    if host.study.protection.robust is not None:
        seen = "the coordinator reads each site's, to leave out what a malicious one sends: `protection.robust`"
    discloses = arm_spec.method.discloses
    rounds = (
        entry("every round", "its weight and its weighted change of the shared values, as integers"),
        entry("", f"({seen})"),
        *unmasked_lines(host),
        *([entry("", discloses)] if discloses else []),
        entry("", f"its {'' if private else 'loss and '}seconds, and sums over validation patients of {names}"),
    )
    prompts = ", embeddings of patients" if host.study.model.prompt_dimension is not None else ""
    kept = f"images, raw data, pictures{prompts}, names, paths" + (
        "" if discloses or not host.study.trains else "; what the method keeps at the site"
    )
    return "\n".join(
        (
            entry("at the start", facts_words(host)),
            *([entry("before round 1", said)] if (said := statistics_words(host)) else ()),
            *(rounds if host.study.trains else ()),
            entry("at the end", _at_the_end(host, with_data=with_data)),
            *(entry("by group", line) for line in (group_lines(host) if with_data else ())),
            entry("beside these", beside_words(host)),
            *_in_the_model(host),
            entry("never", kept),
            entry("", "(a run on one machine shows pictures in its report, of sites whose own results leave)"),
        )
    )


def facts_words(host: Machine) -> str:
    """What a site says of itself before the first round."""
    spent = "; at the end, what its ledger says was spent" if host.study.protection.privacy is not None else ""
    return (
        "its numbers of patients (none below egress.minimum_cohort), public key, versions and kind of processor, and a "
        f"keyed hash that changes when its data do{spent}"
    )


def unmasked_lines(host: Machine) -> Iterator[str]:
    """The arms of a secure study in which a site has no other to be summed with."""
    alone = [name for name, arm in host.arms.items() if arm.inside(host.study)]
    if alone:
        yield entry("", f"(nothing of {', '.join(alone)}: a site trains that inside and sends its test results only)")


def _at_the_end(host: Machine, *, with_data: bool) -> str:
    sites = tuple(host.study.sites)
    if with_data:
        sites = tuple(site for site in sites if _results_leave(host, site, host.dataset(site).patients("test")))
    if not sites:
        return "nothing of test patients: every site keeps its own results"
    some = "" if with_data and len(sites) == len(host.study.sites) else " (only from sites whose own results leave)"
    bare = "; not masked" if host.study.protection.secure else ""
    metrics = "the same metrics" if host.study.trains else ", ".join(spec.name for spec in host.task.metrics)
    return (
        f"number of test patients; mean and standard error of {metrics}, and the standard error of their "
        f"difference to {REFERENCE}{some}{bare}{also_of_parent(host)}"
    )


def also_of_parent(host: Machine) -> str:
    """That a site gives the same numbers of the release that the study continues, where it does."""
    return "" if host.study.continues is None else "; of the release that the study continues, too"


def beside_words(host: Machine) -> str:
    """What messages hold that is nothing of a patient."""
    keys = ", public keys made for each round" if host.study.protection.secure else ""
    return f"the head of its log (a hash){keys}, and where it refuses the reason, without names or paths"


def _in_the_model(host: Machine) -> Iterator[str]:
    """What a site says of its scanners at the start, and a released model's file holds."""
    telling = [site for site in host.study.training_sites if host.egress(site).scanner_facts]
    study = host.study
    # A chain reads volumes, whose headers say nothing of a scanner.
    headed = isinstance(study.task, ReconstructionTask) and study.scanner.headers
    if headed and study.protection.privacy is None and telling:
        yield entry(
            "and in the model",
            "scanners, tube voltages, slice thicknesses and kernels that the headers of DICOM images name, as sets "
            f"({', '.join(telling)}: egress.scanner_facts)",
        )


def _privacy(host: Machine, *, with_data: bool) -> str:
    """What the patients of every training site would spend; nothing for a study without privacy."""
    rules = host.study.protection.privacy
    if rules is None:
        return ""
    lines = [
        "Privacy of patients",
        entry("unit", f"one patient of a site, whose gradient is clipped to {rules.clip:g} in every step"),
        entry("preset", f"{rules.preset}, budget epsilon {rules.budget:g}. {words(rules)}"),
    ]
    if rules.noise == "distributed":
        shared = "shared: only the sum over sites has enough of it, and being drawn for a step by chance counts nothing"
        lines.append(entry("noise", shared))
    if not with_data:
        return "\n".join([*lines, entry("sites", "add --sites SITES to see what the patients of each would spend")])
    outlooks = [host.agent(site).held.budgets.outlook(site, host.dataset(site)) for site in host.study.training_sites]
    header = ("site", "patients", "sample rate", "noise", "delta", "epsilon", "in the ledger")
    rows = [
        (
            o.site,
            str(o.patients),
            f"{o.terms.rate:.3g}",
            f"{o.terms.noise:g}",
            f"{o.terms.delta:.2g}",
            f"{o.planned:.2f}",
            "-" if o.spent is None else f"{o.spent:.2f}",
        )
        for o in outlooks
    ]
    note = "(epsilon: of all planned rounds of all arms; in the ledger: already spent, where the sites file names one)"
    stops = [wrapped(line, "  - ") for line in map(early_end, outlooks) if line]
    return "\n".join([*lines, table(header, rows), wrapped(note, "  "), *stops])


def early_end(outlook: Outlook) -> str:
    """Where a site's budget ends before the study does."""
    if outlook.lasts == outlook.rounds:
        return ""
    when = f"after about round {outlook.lasts} of {outlook.rounds}" if outlook.lasts else "before its first round"
    return (
        f"{outlook.site} would stop {when}: with {outlook.spent or 0.0:.2f} spent, all rounds would come to more than "
        f"its budget of {outlook.terms.epsilon:g}."
    )


def _told(host: Machine, site: str, split: Split) -> bool:
    """Whether somebody else reads what a site's only patient of a split contributes."""
    if split == "test":
        return _results_leave(host, site, 1)
    return not host.study.protection.secure and _withheld(host, site, 1) is None


def _cautions(host: Machine) -> Iterator[str]:
    """What somebody should know before pressing the button."""
    lonely: dict[str, list[str]] = {"validation": [], "test": []}
    absent: dict[str, list[str]] = {"validation": [], "test": []}
    few: list[str] = []
    silent: list[str] = []
    thin: list[str] = []
    weightless: list[str] = []
    measured = host.arm_spec(FEDERATED).method.measures
    for name, site in host.study.sites.items():
        counts = patients_in(host.dataset(name))
        splits: tuple[Split, ...] = ("validation", "test")
        for split in splits:
            if counts[split] == 1 and _told(host, name, split) and (split == "test" or host.study.trains):
                lonely[split].append(name)
            needed = site.role == "train" or (site.role == "evaluate" and split == "test")
            if counts[split] == 0 and needed:
                absent[split].append(name)
        why = _withheld(host, name, counts["validation"])
        if why is not None and counts["validation"] and site.role != "unseen" and host.study.trains:
            silent.append(f"{name} ({why})")
        why = host.egress(name).refusal({LOSS: range(counts["validation"])})
        if measured and why is not None and counts["validation"] and name in host.study.training_sites:
            weightless.append(f"{name} ({why})")
        if 0 < counts["train"] < host.egress(name).minimum_cohort and name in host.study.training_sites:
            thin.append(name)
        if 1 < counts["test"] < 10:
            few.append(f"{name} {counts['test']}")
    lines = [
        f"One {split} patient at {', '.join(names)}: what is sent as a sum is this patient's value."
        for split, names in lonely.items()
        if names
    ]
    lines += [f"No {split} patient at {', '.join(names)}." for split, names in absent.items() if names]
    if silent:
        lines.append(f"Sums over validation patients stay at {', '.join(silent)}: the mean is over the other sites.")
    if weightless and measured:
        lines.append(
            f"{', '.join(weightless)} will refuse every round: a site that trains sends {measured.what}. "
            f"{measured.instead}, or the site more of them."
        )
    if thin:
        lines.append(
            f"{', '.join(thin)}: fewer training patients than egress.minimum_cohort. The update and its loss leave all "
            "the same; `protection.secure` hides them in the sum."
        )
    if few:
        lines.append(f"Few test patients ({', '.join(few)}): expect wide intervals, and none below {LEAST_PATIENTS}.")
    for name in host.study.sites:
        dataset = host.dataset(name)
        aside = summary(host.datasets.aside(name))
        lines += [f"{name}: {aside}."] if aside else []
        lines += [f"{name}: {remark}." for remark in (dataset.remarks() if isinstance(dataset, Headed) else ())]
    lines += [f"{remark}." for remark in remarks_on(host.study, host.sites)]
    lines += [f"{remark}." for remark in remarks_on_given(host.study, host.places)]
    if lines:
        yield "Mind"
    for line in lines:
        yield wrapped(line, "  - ")

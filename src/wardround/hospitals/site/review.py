"""What a proposed study would do at this hospital, in words for a data-protection officer, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wardround.deidentify import describe_error
from wardround.errors import StudyError, WardroundError
from wardround.federation.expected import expected
from wardround.hospitals.keys import fingerprint
from wardround.hospitals.membership.site_file import sites_at
from wardround.hospitals.proposal import Standing, named_code
from wardround.hospitals.roster import SignedRoster
from wardround.hospitals.site.approval import PENDING
from wardround.hospitals.site.decisions import Decisions, Proposed
from wardround.hospitals.site.review_egress import leaves, protected, traffic
from wardround.learning.training import patients_in
from wardround.plan.arms import FEDERATED
from wardround.plan.found import by_content, searched
from wardround.results.units import human_bytes
from wardround.runs.columns import entry, table, wrapped
from wardround.runs.explain import arms_lines, study_lines, training_lines
from wardround.runs.explain_plugins import roles_of
from wardround.runs.machine import NOWHERE, Machine
from wardround.site.egress import ACROSS_HOSPITALS
from wardround.site.memory import footprint_of
from wardround.site.quarantine import summary
from wardround.study.hashes import plan_sha256
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile
from wardround.study.start import Fresh, FromRelease, FromWeights
from wardround.tasks.task import Dataset, Headed
from wardround.version import __version__


@dataclass(frozen=True)
class Review:
    """What is to be read before a decision; with `obstacles` no approval is possible."""

    text: str
    obstacles: tuple[str, ...]


def review(decisions: Decisions, found: Proposed, *, allow_code: bool = False, floor: int = ACROSS_HOSPITALS) -> Review:
    """Look at a proposed study with this hospital's own file and data; nothing is trained and nothing is sent.

    `allow_code` and `floor` are for tests, as those of `Resident`. Raises `WardroundError` where the site's own file
    cannot be read.
    """
    sites = sites_at(decisions.folder)
    standing = decisions.standing(found.sha256)
    head = [_head(decisions, found, standing), _who(decisions, found)]
    try:
        study = load_study(found.proposal.study)
        host = _host(study, found, sites.with_code() if allow_code else sites, floor)
        if any(host.plugins.refused(study)):
            return _not_allowed(decisions, found, head)
        obstacles = []
        plan = plan_sha256(host.plugins.opened(study))
        if plan != found.proposal.plan_sha256:
            obstacles.append(
                f"Wardround {__version__} here fills in other defaults of the study than {found.proposal.package} of "
                "the coordinator: install the same version at both"
            )
        body = list(_body(decisions, found, host, study))
    except WardroundError as error:
        return Review("\n\n".join([*head, _cannot([str(error)])]), (str(error),))
    mind = "\n".join(wrapped(line, "  - ") for line in _mind(decisions.site, host, found))
    ends = [f"Mind\n{mind}"] if mind else []
    ends += (
        [f"Cannot be approved\n{chr(10).join(wrapped(f'{why}.', '  - ') for why in obstacles)}"] if obstacles else []
    )
    return Review("\n\n".join([*head, *body, *ends]), tuple(obstacles))


def _not_allowed(decisions: Decisions, found: Proposed, head: list[str]) -> Review:
    """A study that names code which this hospital does not allow: nothing of it is called, not even to look at it."""
    allowed = sites_at(decisions.folder).of(decisions.site).plugins
    why = [
        f"{name} is code by its place, and no hospital runs such; the study must name an installed plug-in"
        if ":" in name
        else f"site.yaml does not allow the plug-in {name}: if you trust the package that has it, add it to `plugins`"
        for _, name in named_code(found.study)
        if name not in allowed
    ]
    rounds = f"{found.study.schedule.rounds} rounds; what it learns and what leaves is not known without that code"
    what = f"What will run\n{entry('rounds', rounds)}"
    return Review("\n\n".join([*head, what, _code(decisions, found), _cannot(why)]), tuple(why))


def _cannot(why: Sequence[str]) -> str:
    return f"Cannot be approved\n{_listed(f'{line}.' for line in why)}"


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(wrapped(line, "  - ") for line in lines)


def _host(study: Study, found: Proposed, sites: SitesFile, floor: int) -> Machine:
    """The study with this hospital's entry; others take part, and nothing of them is here."""
    (own,) = sites.sites
    whole = SitesFile(sites={name: sites.sites.get(name) or SiteData(data=(Path(),)) for name in study.sites})
    # The others' rules are not known here; what this hospital's own file allows decides.
    others = sites.sites[own].plugins
    whole = SitesFile(
        sites={
            name: entry if name == own else entry.model_copy(update={"plugins": others})
            for name, entry in whole.sites.items()
        }
    )
    whole = whole.with_code() if sites.allows_code else whole
    # Values have no size of their own: what the study starts from need not be here yet.
    fresh = study.model_copy(update={"start": Fresh()})
    places = study.places(found.folder.own, [sites.sites[own]])
    return Machine(fresh, whole, NOWHERE, found.proposal.compare, places=places, floor=floor)


def _body(decisions: Decisions, found: Proposed, host: Machine, study: Study) -> Iterator[str]:
    site, arm_spec = decisions.site, host.arm_spec(FEDERATED)
    dataset, trouble = _opened(host, site)
    bill = expected(host)
    hashes = (f"study_sha256 {found.sha256}", f"plan_sha256 {found.proposal.plan_sha256}")
    # What a study says of itself, its hashes and what it begins with have lines of their own here.
    said = study_lines(host, arm_spec).split("\n  learns")[1].split("\n  start ")[0]
    yield "\n".join(
        [
            "What will run",
            f"  learns{said}",
            entry("start", study.start.describe()),
            *([entry("forgets", study.forget.describe())] if study.forget is not None else []),
            training_lines(host, arm_spec),
            entry("time", "of computing: not known before it runs; see how long the messages take below"),
            entry("memory", _memory(host, site, dataset)),
            *(entry("hash", text) for text in hashes),
        ]
    )
    if study.trains:
        yield f"Models that are trained\n{arms_lines(host)}"
    yield f"On which patients\n{_patients(host, site, dataset, trouble)}"
    yield f"What leaves this hospital\n{leaves(host, arm_spec, site, dataset)}"
    yield f"How much of it\n{traffic(host, bill, site)}"
    yield f"How it is protected\n{protected(host, site, dataset)}"
    yield _code(decisions, found)
    yield f"What stays and is kept here\n{_kept(decisions, found, study)}"


def _head(decisions: Decisions, found: Proposed, standing: Standing) -> str:
    federation = decisions.federation
    said = {"pending": "waits for a decision", "approved": "is approved", "refused": "was refused"}[standing.state]
    why = "" if standing.reason in ("", PENDING) else f": {standing.reason}"
    lines = [
        f"Study {found.study.name}, proposed to {decisions.site} by the federation {federation.name}",
        entry("about", found.study.description or "the study says nothing of itself"),
        entry("state", said + why),
        entry("coordinator", f"{federation.host}, port {federation.port}, with Wardround {found.proposal.package}"),
        entry("here", f"Wardround {__version__}"),
    ]
    return "\n".join(lines)


def _who(decisions: Decisions, found: Proposed) -> str:
    roles = roles_of(found.study)
    rows = [
        (name, roles[site.role], "this hospital" if name == decisions.site else "")
        for name, site in found.study.sites.items()
    ]
    note = (
        "Each signs with a key of its own; the federation's root signed the list of keys. A decision is bound to the "
        "keys of these hospitals. Who holds the root's key could invent one: compare the words with the hospitals "
        "themselves, by telephone."
    )
    keys = SignedRoster.load(decisions.folder.roster).keys
    words = "\n".join(entry("key", f"{name}: {fingerprint(keys[name])}") for name in found.study.sites if name in keys)
    return f"Who takes part\n{table(('hospital', 'role', ''), rows)}\n{words}\n{wrapped(note, '  ')}"


def _opened(host: Machine, site: str) -> tuple[Dataset | None, str]:
    """The hospital's data, or why they cannot be opened."""
    try:
        return host.dataset(site), ""
    except Exception as error:
        # For eyes at the hospital, and still no patient's name: it may be copied into a mail.
        return None, describe_error(error)


def _memory(host: Machine, site: str, dataset: Dataset | None) -> str:
    """What training takes here, as `wardround plan` finds it."""
    entry_of_site = host.sites.of(site)
    where = f"device {entry_of_site.device}, threads on the CPU: {entry_of_site.threads}"
    if site not in host.study.training_sites:
        return f"no training here; {where}"
    if dataset is None:
        return f"not known while the data cannot be opened; {where}"
    try:
        taken = footprint_of(host, dataset, host.agent(site).held.compute)
    except Exception as error:
        return f"not known ({describe_error(error)}); {where}"
    room = f" of the {entry_of_site.memory:g} GB of site.yaml" if entry_of_site.memory is not None else ""
    return f"training takes {human_bytes(taken.total)}{room}; {where}"


def _patients(host: Machine, site: str, dataset: Dataset | None, trouble: str) -> str:
    data = host.sites.of(site)
    folders = "a folder" if len(data.data) == 1 else f"{len(data.data)} folders"
    listed = ", of which a list names the patients that may be used" if data.patients is not None else ""
    lines = [entry("data", f"{folders} that site.yaml names{listed}")]
    if dataset is None:
        return "\n".join([*lines, entry("counts", f"the data cannot be opened: {trouble}")])
    counts = patients_in(dataset)
    uses = {
        "train": "the model learns from them" if host.study.trains else "not used: nothing is trained",
        "validation": "they choose the round that is released" if host.study.trains else "they choose thresholds",
        "test": "the released model is measured on them at the end",
    }
    role = host.study.sites[site].role
    used = {"train": ("train", "validation", "test"), "evaluate": ("validation", "test"), "unseen": ("test",)}[role]
    rows = [
        (split, str(count), uses[split] if split in used else "not used: the role of this hospital")
        for split, count in counts.items()
    ]
    lines.append(table(("part", "patients", "what for"), rows))
    aside = summary(host.datasets.aside(site))
    lines += [entry("set aside", aside)] if aside else []
    lines += [entry("mind", remark) for remark in (dataset.remarks() if isinstance(dataset, Headed) else ())]
    return "\n".join(lines)


def _code(decisions: Decisions, found: Proposed) -> str:
    """What runs here that is no part of the package, and what the model begins with."""
    binding = decisions.binding(found)
    allowed = sites_at(decisions.folder).of(decisions.site).plugins
    lines = [entry("code", "none comes with a study: it names what is installed here, and this hospital allows it")]
    for part, name in named_code(found.study):
        version = binding.plugins.get(name) or "not installed here"
        yes = "site.yaml allows it" if name in allowed else "site.yaml does not allow it (`plugins`)"
        lines.append(entry("plug-in", f"{name} ({part}), {version}; {yes}"))
    if len(lines) == 1:
        lines.append(entry("plug-ins", "none: the study uses Wardround's own parts alone"))
    lines.append(entry("base weights", _weights(found, decisions)))
    if found.proposal.teacher_sha256 is not None:
        lines.append(entry("teacher", f"the released model of sha256 {found.proposal.teacher_sha256}; it must be here"))
    return "Code and weights\n" + "\n".join(lines)


def _weights(found: Proposed, decisions: Decisions) -> str:
    start = found.study.start
    if not isinstance(start, FromWeights | FromRelease):
        return "none: the model begins with values drawn from the study's seed"
    if isinstance(start, FromRelease):
        return f"the released model {start.sha256}; it must be here: site.yaml says where (`start`)"
    own = sites_at(decisions.folder).of(decisions.site)
    file = own.start if own.start is not None and own.start.is_file() else None
    file = file or by_content(start.sha256, Path(start.file).name, searched(own.weights))
    where = "found here" if file is not None else "not found here: site.yaml says where they are (`start`, `weights`)"
    return f"sha256 {start.sha256}, {where}. They are checked against it and are in no message"


def _kept(decisions: Decisions, found: Proposed, study: Study) -> str:
    own = sites_at(decisions.folder).of(decisions.site)
    sealed = "encrypted with the key of site.yaml" if own.encryption_key else "not encrypted (`encryption_key`)"
    ledger = study.protection.privacy is not None
    return "\n".join(
        (
            entry("images", "are read where they are, never copied out, and in no message"),
            entry("per study", f"its last answers, a log of all that it answered, {sealed}; the released model"),
            entry("over studies", "which patients train and test" + (", and the privacy spent" if ledger else "")),
            entry("decision", "signed with this hospital's key; it can be taken back at any time (refuse)"),
        )
    )


def _mind(site: str, host: Machine, found: Proposed) -> Iterator[str]:
    if found.proposal.package != __version__:
        yield (
            f"The coordinator has Wardround {found.proposal.package} and this hospital {__version__}; results "
            "may differ in the last digits."
        )
    if not host.study.protection.secure and host.study.protection.privacy is None:
        yield "The coordinator could read this hospital's updates; only the number of patients hides one in them."
    dataset, least = _opened(host, site)[0], host.egress(site).least
    if dataset is not None and host.study.sites[site].role == "train" and dataset.patients("train") < least:
        yield (
            f"This hospital has fewer than {least} training patients: counts and results of so few stay here, and the "
            "update of the model, its loss and its weight leave all the same."
        )


def refuse_obstacles(found: Review) -> None:
    """Raise `StudyError` for a study that cannot be approved."""
    if found.obstacles:
        raise StudyError("the study cannot be approved: " + "; ".join(found.obstacles))

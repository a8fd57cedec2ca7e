"""`wardround update`: a study that goes on from a release, with the patients that have come since."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wardround.errors import DataError, StudyError
from wardround.living.chain import Chain
from wardround.living.fisher import needed_fisher, with_fisher
from wardround.living.release import Release, short
from wardround.results.schema import Result
from wardround.runs.folder import reserve
from wardround.runs.session import open_host, run
from wardround.runs.watching import Watcher
from wardround.site.datasets import history_of
from wardround.site.lineage import Lineage
from wardround.site.own_parts import second_name
from wardround.study.hashes import differing
from wardround.study.load import load_study, read_yaml, validate
from wardround.study.load import written as stated
from wardround.study.schema import Study
from wardround.study.sites import SitesFile, load_sites
from wardround.tasks.task import Named
from wardround.wire.files import write_text

# The release that a prepared study starts from, beside its file: the study is whole without the old run's folder.
PARENT_FILE = "parent.safetensors"
# Not `study.yaml`: that is of a run that has begun.
STUDY_FILE = "update.yaml"
# The study that is run before it, where hospitals measure what the release must not lose (`update.retain: ewc`).
FISHER_FILE = "fisher.yaml"
_MORE = "to train more rounds with the same patients, give --more-rounds N"


@dataclass(frozen=True)
class Prepared:
    """A study that continues a release, where it lies, and how many new training patients its sites have.

    `new` is empty for sites that were not asked.
    """

    study: Study
    folder: Path
    release: str
    new: Mapping[str, int]

    @property
    def said(self) -> str:
        """For people on this machine."""
        training = ", ".join(
            f"{site} ({self.new[site]} new)" if site in self.new else site for site in self.study.training_sites
        )
        others = [name for name in self.study.sites if name not in self.study.training_sites]
        still = f"; {', '.join(others)} only measure{'s' if len(others) == 1 else ''}" if others else ""
        return f"Continues release {short(self.release)}: {training} train{still}"


def prepare(
    release: Release,
    study: Study | str | Path | Mapping[str, Any],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    sites: SitesFile | None = None,
    train: Collection[str] = (),
    more_rounds: int | None = None,
) -> Prepared:
    """Write the study that continues a release into `out`, with the release beside it.

    Only sites with training patients that the release did not see train; the others measure. On one machine each is
    asked (`sites`); across hospitals people say who has some (`train`). With `more_rounds`, that number of rounds, or
    where the study says `update.train_on: all`, all train. A study that was prepared in `out` before stands. Raises
    `StudyError` for a release of another task or model, and where no site has anything new; `DataError` where a site
    does not know what it must.
    """
    draft = _draft(release, study, overrides, more_rounds)
    check_same_task(release, draft)
    if (out / STUDY_FILE).exists():
        return _again(release, out)
    if sites is not None:
        check_known(release, draft, sites)
    changes = stated(draft)
    # Whatever is wrong with the study is said before a folder is made.
    reserve(out)
    _keep_beside(release, out)
    if sites is not None:
        _carry_histories(release, draft, sites, out)
    new: dict[str, int] = {}
    if draft.update is not None and draft.update.train_on == "new":
        if unknown := sorted(set(train) - set(draft.training_sites)):
            raise StudyError(f"--train {unknown[0]}: the study has no such site that trains")
        new = {} if sites is None or train else new_patients(release, draft, sites, out)
        chosen = set(train) or {site for site, count in new.items() if count}
        if not chosen:
            raise StudyError(
                "no site has training patients that the release did not see, so there is nothing to update with; "
                + (_MORE if sites is not None else "say with --train which sites have some; " + _MORE)
            )
        changes = _with_roles(draft, changes, chosen)
    found = validate(Study, changes, "study")
    _write(found, out)
    if sites is None and (needed := needed_fisher(found, out)) is not None:
        write_text(out / FISHER_FILE, yaml.safe_dump(stated(needed), sort_keys=False, allow_unicode=True))
    return Prepared(found, out, release.sha256, new)


def update(
    release: Release | str | Path,
    study: Study | str | Path | Mapping[str, Any],
    sites: SitesFile | str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    train: Collection[str] = (),
    more_rounds: int | None = None,
    chain: Chain | None = None,
    compare: Sequence[str] = (),
    engine: str | None = None,
    processes: int | None = None,
    watcher: Watcher | None = None,
    quiet: bool = False,
    allow_code: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> Result:
    """Prepare (`prepare`) and run a study that continues a release; made again, it goes on where it was.

    `release` is the folder of a finished run, or a released model's file. `out` is a folder of its own.
    Of a `chain` the new model becomes an entry, promoted or refused; the release becomes one before, where it is none.
    `told` is called with who trains, before anything does.

    Raises as `prepare` and `wardround.run` do. The release and the folder of its run stay as they are.

    >>> later = update("out", "study.yaml", "sites.yaml", "second", more_rounds=5)  # doctest: +SKIP
    >>> later.gate.promoted  # doctest: +SKIP
    """
    if not isinstance(sites, SitesFile):
        sites = load_sites(sites)
    sites = sites.with_code() if allow_code else sites
    release = release if isinstance(release, Release) else Release.at(Path(release))
    out = Path(out)
    if chain is not None and not any(entry.release == release.sha256 for entry in chain.check()):
        chain.add(release)
    prepared = prepare(release, study, out, overrides=overrides, sites=sites, train=train, more_rounds=more_rounds)
    told(prepared.said)
    held = _held(prepared, sites, engine=engine, watcher=watcher, quiet=quiet)
    result = run(
        held,
        sites,
        out,
        compare=compare,
        engine=engine,
        processes=processes,
        watcher=watcher,
        quiet=quiet,
        near=out,
    )
    if chain is not None:
        chain.add(Release.at(out))
    return result


def _held(prepared: Prepared, sites: SitesFile, *, engine: str | None, watcher: Watcher | None, quiet: bool) -> Study:
    """The prepared study with the Fisher information that `update.retain: ewc` needs, measured where it has none."""
    out = prepared.folder
    own = {
        name: entry if entry.history else entry.model_copy(update={"history": history_of(sites, out, name)})
        for name, entry in sites.sites.items()
    }
    study = with_fisher(
        prepared.study,
        sites.model_copy(update={"sites": own}),
        out / "fisher",
        out,
        engine=engine,
        watcher=watcher,
        quiet=quiet,
    )
    if study is not prepared.study:
        _write(study, out)
    return study


def _write(study: Study, out: Path) -> None:
    write_text(out / STUDY_FILE, yaml.safe_dump(stated(study), sort_keys=False, allow_unicode=True))


def check_same_task(release: Release, study: Study) -> None:
    """Raise `StudyError` for a release of another task or model than the study's."""
    before, now = release.study, study
    if before.task.kind != now.task.kind:
        raise StudyError(
            f"the release is of another task (`{before.task.kind}`) than the study (`{now.task.kind}`); give the study "
            "that it came of, or another release"
        )
    if before.model.closed or now.model.closed:
        keys = "" if before.model.kind == now.model.kind else f"kind was {before.model.kind} and is {now.model.kind}"
    else:
        keys = differing(before.model.model_dump(mode="json"), now.model.model_dump(mode="json"))
    if keys:
        raise StudyError(f"the release is of another model than the study's (model: {keys}); give a study of its model")


def check_known(release: Release, study: Study, sites: SitesFile) -> None:
    """Raise `DataError` where a site that trained the release has no record of it: its test patients may have."""
    before = release.study
    # Of a release that came of another, sites that only measured may have trained that.
    trained = (*before.training_sites, *(() if before.update is None else before.sites))
    for site in study.sites:
        if site not in trained or study.sites[site].scans:
            continue
        history = _history(release, sites, site)
        if history is None:
            raise DataError(
                f"sites.{site}.history: the site trained the release, and which of its patients did stands in its "
                "history folder, which its entry of the sites file does not name; name it, or give the folder of the "
                "run instead of the model's file"
            )
        if not Lineage(history).knows(release.sha256):
            raise DataError(
                f"site {site} trained the release {short(release.sha256)}, and its history folder does not know it, so "
                "patients who trained it could test its successor; restore the folder, or start a study anew",
                detail=str(history),
            )


def new_patients(release: Release, study: Study, sites: SitesFile, out: Path) -> dict[str, int]:
    """By training site, how many of its training patients neither the release nor an ancestor of it was trained on.

    Raises `DataError` for data that name no patients.
    """
    host = open_host(study, sites, out, (), (), None, near=out)
    found: dict[str, int] = {}
    for site in study.training_sites:
        dataset = host.dataset(site)
        if not isinstance(dataset, Named):
            raise DataError(
                f"the data of site {site} name no patients, so new ones cannot be told from others; say with --train "
                "which sites have some"
            )
        names = dataset.names("train")
        history = history_of(sites, out, site)
        known = frozenset() if history is None else Lineage(history).trained(release.sha256, names, release.ancestors)
        found[site] = len(set(names) - known)
    host.close()
    return found


def _again(release: Release, out: Path) -> Prepared:
    """The study that was prepared in a folder before."""
    study = load_study(out / STUDY_FILE)
    if study.continues != release.sha256:
        raise StudyError(
            f"the folder holds a study that does not continue release {short(release.sha256)}; choose another --out",
            detail=str(out),
        )
    return Prepared(study, out, release.sha256, {})


def _draft(
    release: Release,
    study: Study | str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    more_rounds: int | None,
) -> Study:
    """What the study says, going on from the release. It may have a section `update` before it names a release."""
    if isinstance(study, Study):
        given = stated(study)
    else:
        given = dict(study) if isinstance(study, Mapping) else read_yaml(study, "study")
    near = Path(study).parent if isinstance(study, str | Path) else Path()
    start: dict[str, Any] = {"kind": "release", "file": PARENT_FILE, "sha256": release.sha256}
    # A personal part begins with what each site has of the release, and at a new site fresh.
    start |= {"partial": True} if release.personal else {}
    changes = [*overrides]
    if more_rounds is not None:
        changes.append(f"schedule.rounds={more_rounds}")
        changes.append("update.train_on=all")
    section = dict(given.get("update") or {}) | ({"ancestors": list(release.ancestors)} if release.ancestors else {})
    return load_study({**given, "start": start, "update": section}, changes, near=near)


def _with_roles(study: Study, changes: Mapping[str, Any], chosen: Collection[str]) -> dict[str, Any]:
    """The same with every site that has nothing new measuring alone.

    It validates too, where its sums may stand by themselves: under masks they may not.
    """
    split = getattr(study.task, "split", None)
    holds_out = split is None or split.validation > 0
    asks = study.schedule.validate_every > 0 and not study.protection.secure and holds_out
    role = "evaluate" if asks else "unseen"
    said: dict[str, Any] = {}
    for name, site in study.sites.items():
        own = dict(changes["sites"].get(name) or {})
        idle = site.role == "train" and name not in chosen
        said[name] = {**own, "role": role} if idle else own
    schedule = dict(changes.get("schedule") or {})
    if study.schedule.min_sites > len(chosen):
        schedule["min_sites"] = len(chosen)
    return {**changes, "sites": said} | ({"schedule": schedule} if schedule else {})


def _keep_beside(release: Release, out: Path) -> None:
    """The release and its frozen part, in the new study's folder."""
    second_name(release.model, out / PARENT_FILE)
    if (part := release.frozen_part) is not None:
        second_name(part, out / "weights" / part.name)


def _history(release: Release, sites: SitesFile, site: str) -> Path | None:
    """Where a site keeps what it knows of the release: the folder that its entry names, else that of the run."""
    entry = sites.sites.get(site)
    if entry is None or entry.history is not None or release.run is None:
        return None if entry is None else entry.history
    return history_of(sites, release.run, site)


def _carry_histories(release: Release, study: Study, sites: SitesFile, out: Path) -> None:
    """Let sites that keep a history in the run's folder go on with a copy of it: the old run stays whole."""
    for site in study.sites:
        entry = sites.sites.get(site)
        if entry is None or entry.history is not None or release.run is None:
            continue
        before, now = history_of(sites, release.run, site), history_of(sites, out, site)
        if before is not None and now is not None and before.is_dir() and not now.exists():
            draft = now.with_name(now.name + ".draft")
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(before, draft)
            draft.rename(now)


def release_named(named: str, chain: Chain | None = None) -> Release:
    """The release that people name: a run's folder, a model's file, a chain's folder (the release in use there), or,
    in `chain`, a number, the first digits of a hash, or `current`.

    Raises `StudyError` where there is none, and `JournalError` where the chain is broken.
    """
    path = Path(named)
    if Chain.is_chain(path):
        chain, named = Chain(path), "current"
    elif path.exists() or chain is None:
        return Release.at(path)
    return Release(chain.model(chain.find(named)))

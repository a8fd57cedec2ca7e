"""A hospital leaves: the studies that make a model without it, and the runs that carry them out.

The exact way trains anew, from the last release in whose ancestry the hospital never trained, else from where the study
begins by itself. The approximate way takes two studies: rounds in which the hospital takes back what it taught
(`learning.methods.unlearn`) while the others go on training, then rounds without it. What is left after either is
measured (`audit.remains`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.errors import DataError, StudyError
from wardround.federation.release import shared_sha256
from wardround.plan.leaving import left_by
from wardround.plan.weights import open_model, study_of
from wardround.results.schema import Result
from wardround.runs.folder import near_in
from wardround.runs.session import run
from wardround.runs.watching import Watcher
from wardround.study.hashes import written
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.study.start import FromRelease

UNLEARNED = "unlearned"
# Rounds of the approximate way, as shares of the study's.
UNLEARN_SHARE, RECOVER_SHARE = 0.1, 0.2


@dataclass(frozen=True)
class Ancestor:
    """A release and, where it began with another, the next one back; `whole` is whether that one was found."""

    path: Path
    sha256: str
    study: Study


def model_in(release: Path) -> Path:
    """The model of a run's folder, or the file itself. Raises `DataError` where neither is there."""
    path = release / "models" / "federated.safetensors" if release.is_dir() else release
    if not path.is_file():
        raise DataError("--release: no released model, and no folder of a run that has one", detail=str(release))
    return path


def lineage(release: Path) -> tuple[tuple[Ancestor, ...], bool]:
    """A release and those that it came of, the newest first, and whether the way back to the first is known whole.

    Each model file carries its study, which names the hash of what it began with; the file is looked for where the run
    found it. Raises `DataError` for a release that is none, and for an ancestor that is another than the study says.
    """
    found: list[Ancestor] = []
    path, expected = model_in(release), ""
    while True:
        metadata = open_model(path)[1]
        study, sha256 = study_of(path, metadata), shared_sha256(path)
        if expected and sha256 != expected:
            raise DataError(
                "the chain of releases is broken: the model that a release began with is another now; restore it",
                detail=str(path),
            )
        found.append(Ancestor(path, sha256, study))
        if not isinstance(study.start, FromRelease):
            return tuple(found), True
        before = _start_file(path, study.start)
        if before is None or any(one.sha256 == study.start.sha256 for one in found):
            return tuple(found), False
        path, expected = before, study.start.sha256


def _start_file(path: Path, start: FromRelease) -> Path | None:
    """The file with which the run of a released model began; nothing where it is no longer there."""
    out = path.parent.parent
    for near in (near_in(out), out, out.parent):
        place = near / start.file
        file = place / "models" / "federated.safetensors" if place.is_dir() else place
        if file.is_file():
            return file
    return None


def last_without(site: str, ancestors: Sequence[Ancestor], *, whole: bool) -> Ancestor | None:
    """The last release in whose ancestry a site never trained; none where none is known to be so.

    `ancestors` are those of `lineage`. Of a release whose own ancestors are not all known nobody can say it.
    """
    if not whole:
        return None
    clean: Ancestor | None = None
    for one in reversed(ancestors):
        if site in one.study.training_sites:
            break
        clean = one
    return clean


@dataclass(frozen=True)
class Way:
    """Studies to be run one after another; each but the first starts from the one before, or from a release.

    `near` is the folder to which their `start.file` is relative, `folder` where a study's run is, below the output.
    """

    study: Study
    folder: str
    near: Path


def exact(study: Study, near: Path, site: str, release: Path, approved_by: Sequence[str]) -> Way:
    """The study that trains anew without a site; raises `StudyError` where it cannot be done or is not approved."""
    ancestors, whole = lineage(release)
    _check_took_part(site, ancestors)
    clean = last_without(site, ancestors, whole=whole)
    said = _without(study, site)
    if clean is not None:
        near = clean.path.parent
        said["start"] = {"kind": "release", "file": clean.path.name, "sha256": clean.sha256}
        said["start"] |= {"partial": True} if _has_personal_part(clean) else {}
    elif isinstance(study.start, FromRelease):
        said.pop("start")
    said["forget"] = _section(site, ancestors[0].sha256, "retrain", approved_by)
    return Way(load_study(said, near=near), "", near)


def approximate(
    study: Study,
    site: str,
    release: Path,
    out: Path,
    approved_by: Sequence[str],
    *,
    unlearn: int | None = None,
    recover: int | None = None,
    mu: float = 0.0,
) -> tuple[Way, Way]:
    """The two studies of the approximate way: `unlearn` rounds with the site, then `recover` rounds without it.

    The second names the hash of what the first gives, which is known once that has run: until then it is empty. Raises
    `StudyError` where it cannot be done or is not approved.
    """
    ancestors, _ = lineage(release)
    _check_took_part(site, ancestors)
    if site not in study.training_sites:
        raise StudyError(
            f"--approximate: site {site} takes back what it taught, so the study must have it as a site that trains; "
            "retrain without it, or add it to the study file for these rounds"
        )
    if study.method.kind != "fedavg":
        raise StudyError(
            f"--approximate: works for method.kind fedavg, and the study's is {study.method.kind}, which keeps more at "
            "sites or coordinator than a model; retrain without the site"
        )
    first = ancestors[0]
    rounds = study.schedule.rounds
    said = written(study)
    weights = getattr(study.method, "weights", "samples")
    said |= {
        "method": {"kind": "unlearn", "site": site, "mu": mu, "weights": weights},
        "start": {"kind": "release", "file": first.path.name, "sha256": first.sha256},
        "forget": _section(site, first.sha256, "unlearn", approved_by),
    }
    number = unlearn or max(1, round(UNLEARN_SHARE * rounds))
    said["schedule"] = {**said.get("schedule", {}), "rounds": number, "release": "last", "phases": []}
    near = first.path.parent
    before = Way(load_study(said, near=near), UNLEARNED, near)
    after = _without(study, site)
    after |= {
        "start": {"kind": "release", "file": UNLEARNED, "sha256": ""},
        "forget": _section(site, first.sha256, "recover", approved_by),
    }
    number = recover or max(1, round(RECOVER_SHARE * rounds))
    after["schedule"] = {**after.get("schedule", {}), "rounds": number, "phases": []}
    return before, Way(load_study(after, near=out), "", out)


def study_that_had(site: str, release: Path) -> tuple[Study, Path]:
    """The study of the newest release in which a site trained, and the folder that its files are relative to.

    Its patients are dealt as they were then. Raises `StudyError` where it trained none of them.
    """
    for one in lineage(release)[0]:
        if site in one.study.training_sites:
            return one.study, near_in(one.path.parent.parent)
    raise StudyError(f"site {site} trained neither this release nor one before it")


def forget_exactly(
    way: Way, sites: SitesFile, out: Path, *, watcher: Watcher | None = None, engine: str | None = None
) -> Result:
    """Carry out what `exact` gives; raises as `run`."""
    return run(way.study, _other_start(way.study, sites), out, near=way.near, watcher=watcher, engine=engine)


def forget_approximately(
    ways: tuple[Way, Way], sites: SitesFile, out: Path, *, watcher: Watcher | None = None, engine: str | None = None
) -> tuple[Result, Result]:
    """Carry out what `approximate` gives, one study after the other; raises as `run`. Stopped, it goes on by itself."""
    before, after = ways
    sites = _other_start(before.study, sites)
    unlearned = run(before.study, sites, out / UNLEARNED, near=before.near, watcher=watcher, engine=engine)
    said = written(after.study)
    said["start"]["sha256"] = unlearned.model_sha256
    recovered = run(load_study(said, near=out), sites, out / "recovered", near=out, watcher=watcher, engine=engine)
    return unlearned, recovered


def _other_start(study: Study, sites: SitesFile) -> SitesFile:
    """The sites, without their own copies of the file that the study started from, where it starts from a release."""
    if not isinstance(study.start, FromRelease):
        return sites
    found = sites.model_copy(
        update={"sites": {name: entry.model_copy(update={"start": None}) for name, entry in sites.sites.items()}}
    )
    return found.with_code() if sites.allows_code else found


def _check_took_part(site: str, ancestors: Sequence[Ancestor]) -> None:
    if site in left_by(open_model(ancestors[0].path)[1]):
        raise StudyError(f"site {site} left this release, or one before it, already: there is nothing to forget")
    if not any(site in one.study.training_sites for one in ancestors):
        known = sorted({name for one in ancestors for name in one.study.training_sites})
        raise StudyError(f"site {site} trained neither this release nor one before it; known are {', '.join(known)}")


def _section(site: str, release: str, how: str, approved_by: Sequence[str]) -> dict[str, Any]:
    if not approved_by:
        raise StudyError(
            f"--approved-by: nobody is named. The new model and the released one together reveal what {site} "
            f"contributed: ask every site of the study, and {site}, and name them"
        )
    return {"site": site, "release": release, "how": how, "approved_by": list(approved_by)}


def _without(study: Study, site: str) -> dict[str, Any]:
    """What a study says, without a site. Raises `StudyError` where it is nothing without it."""
    said = json.loads(json.dumps(written(study)))
    said["sites"].pop(site, None)
    left = [name for name, one in study.sites.items() if one.role == "train" and name != site]
    if not left:
        raise StudyError(f"no site that trains is left without {site}; there is no model to make, only one to delete")
    for name, one in said["sites"].items():
        if isinstance(one, Mapping) and site in one.get("scans", ()):
            raise StudyError(f"sites.{name}.scans names {site}, which leaves; take it out of the study first")
    schedule = said.get("schedule", {})
    if schedule.get("min_sites", 1) > len(left):
        schedule["min_sites"] = len(left)
    said.pop("update", None)
    return said


def _has_personal_part(ancestor: Ancestor) -> bool:
    metadata = open_model(ancestor.path)[1]
    tensors = open_model(ancestor.path)[0]
    return not set(tensors) <= set(metadata.get("shared", "").split())

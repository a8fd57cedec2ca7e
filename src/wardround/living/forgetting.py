"""A hospital leaves: the studies that make a model without it, and the runs that carry them out.

The exact way trains anew, from the last release in whose ancestry the hospital never trained, else from where the study
begins by itself. The approximate way shrinks what the model learned towards those same values, and lets the others
train on for a few rounds; before that the hospital may take back what it taught (`learning.methods.unlearn`). What is
left after either is measured (`audit.remains`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from safetensors.numpy import save

from wardround.errors import DataError, StudyError
from wardround.federation.release import shared_sha256
from wardround.living.chain import Chain
from wardround.living.release import Release
from wardround.plan.found import file_sha256
from wardround.plan.leaving import left_by
from wardround.plan.weights import load_model, open_model, study_of
from wardround.results.schema import Result
from wardround.runs.folder import near_in
from wardround.runs.machine import NOWHERE
from wardround.runs.session import open_host, run
from wardround.runs.watching import Watcher
from wardround.study.hashes import written
from wardround.study.load import load_study
from wardround.study.registry import UNLEARNING, default_kind
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile
from wardround.study.start import FromRelease
from wardround.wire.files import write_text
from wardround.wire.files import written as file_written

Array = npt.NDArray[Any]
UNLEARNED, RECOVERED, SHRUNK, START = "unlearned", "recovered", "shrunk.safetensors", "start.safetensors"
# Of what a model learned, and of the study's rounds: what the approximate way keeps, and how long it recovers.
KEEP, RECOVER_SHARE = 0.2, 0.3


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


def lineage(release: Path, chain: Chain | None = None) -> tuple[tuple[Ancestor, ...], bool]:
    """A release and those that it came of, the newest first, and whether the way back to the first is known whole.

    Each model file carries its study, which names the hash of what it began with; the file is looked for where the run
    found it, and in a chain of releases where there is one. Raises `DataError` for a release that is none, and for an
    ancestor that is another than the study says.
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
        before = _start_file(path, study.start) or _in_chain(chain, study.start.sha256)
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


def _in_chain(chain: Chain | None, sha256: str) -> Path | None:
    """The file of a model of a chain; nothing where that has it not."""
    entries = () if chain is None else chain.entries()
    entry = next((one for one in entries if one.release == sha256), None)
    return None if chain is None or entry is None else chain.model(entry)


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


def exact(
    study: Study, near: Path, site: str, release: Path, approved_by: Sequence[str], *, chain: Chain | None = None
) -> Way:
    """The study that trains anew without a site; raises `StudyError` where it cannot be done or is not approved.

    It begins with the last release in whose ancestry the site never trained: of the `chain` where there is one, else of
    the release's own ancestors, as far as their files are still where they were.
    """
    ancestors, whole = lineage(release, chain)
    _check_took_part(site, ancestors, whole)
    clean = last_without(site, ancestors, whole=whole)
    if chain is not None and (entry := chain.last_without(site)) is not None:
        clean = lineage(chain.model(entry), chain)[0][0]
    said = _without(study, site)
    if clean is not None:
        near = clean.path.parent
        said["start"] = {"kind": "release", "file": clean.path.name, "sha256": clean.sha256}
        said["start"] |= {"partial": True} if _has_personal_part(clean) else {}
    elif isinstance(study.start, FromRelease):
        said.pop("start")
    said["forget"] = _section(site, ancestors[0].sha256, "retrain", approved_by)
    return Way(load_study(said, near=near), "", near)


@dataclass(frozen=True)
class Approximately:
    """How a hospital is forgotten approximately: `ascent` first where it takes back what it taught, then `recover`.

    Recovery begins with `keep` of what `model` learned beyond the values of `never`, the start of the exact way.
    """

    ascent: Way | None
    never: Way
    model: Path
    recover: Mapping[str, Any]
    keep: float


def approximate(
    study: Study,
    near: Path,
    site: str,
    release: Path,
    approved_by: Sequence[str],
    *,
    keep: float = KEEP,
    rounds: int | None = None,
    ascent: int = 0,
    chain: Chain | None = None,
) -> Approximately:
    """Shrink what a released model learned towards values that the site never touched, and train on without it.

    The values are w = w_never + keep (w_release - w_never), where w_never is what the exact way starts from (after Ash
    & Adams, "On warm-starting neural network training", NeurIPS 2020, who shrink towards zero; Deng et al., MICCAI
    2024, mix with a model of before as well). What the model remembers of single patients shrinks with them, and the
    other sites' rounds bring back what they teach; the site that leaves need not be there. `ascent` rounds before that
    have it take back what it taught (`learning.methods.unlearn`). Raises `StudyError` where it cannot be done or is not
    approved.
    """
    if not 0.0 < keep < 1.0:
        raise StudyError("--keep: a share between 0 and 1; with 0 it is the exact way, with 1 nothing is forgotten")
    never = exact(study, near, site, release, approved_by, chain=chain)
    first = lineage(release, chain)[0][0]
    after = written(never.study)
    after["forget"]["how"] = "recover"
    number = rounds or max(1, round(RECOVER_SHARE * study.schedule.rounds))
    after["schedule"] = {**after.get("schedule", {}), "rounds": number, "phases": []}
    way = _ascent(study, site, first, approved_by, ascent) if ascent else None
    return Approximately(way, never, first.path, after, keep)


def _ascent(study: Study, site: str, first: Ancestor, approved_by: Sequence[str], rounds: int) -> Way:
    if site not in study.training_sites:
        raise StudyError(
            f"--ascent: site {site} takes back what it taught, so the study must have it as a site that trains; leave "
            "--ascent out, or add it to the study file for these rounds"
        )
    if study.method.kind != default_kind("method"):
        raise StudyError(
            f"--ascent: works for method.kind {default_kind('method')}, and the study's is {study.method.kind}, which "
            "keeps more at sites or coordinator than a model; leave --ascent out"
        )
    said = written(study)
    said |= {
        "method": {"kind": UNLEARNING, "site": site, "weights": getattr(study.method, "weights", "samples")},
        "start": {"kind": "release", "file": first.path.name, "sha256": first.sha256},
        "forget": _section(site, first.sha256, "unlearn", approved_by),
    }
    said["schedule"] = {**said.get("schedule", {}), "rounds": rounds, "release": "last", "phases": []}
    return Way(load_study(said, near=first.path.parent), UNLEARNED, first.path.parent)


def shrunk(plan: Approximately, model: Path, sites: SitesFile, out: Path) -> Way:
    """The study of the recovery; what it begins with is written to `out`, and the study names its hash."""
    never = open_host(
        plan.never.study, _other_start(plan.never.study, sites), NOWHERE, (), (), None, near=plan.never.near
    )
    tensors, metadata = load_model(model)
    values = mixed(never.model_context.initial_values(), tensors, metadata["shared"].split(), plan.keep)
    with file_written(out / SHRUNK) as file:
        file.write(save(values))
    said = {**plan.recover, "start": {"kind": "weights", "file": SHRUNK, "sha256": file_sha256(out / SHRUNK)}}
    return Way(load_study(said, near=out), RECOVERED, out)


def mixed(
    never: Mapping[str, Array], learned: Mapping[str, Array], shared: Sequence[str], keep: float
) -> dict[str, Array]:
    """never + keep (learned - never) of the `shared` values, in double precision and rounded once; others as `never`.

    Whole numbers, which count and mean nothing without what they counted, are left out.
    """
    found = {name: array for name, array in never.items() if np.issubdtype(array.dtype, np.floating)}
    for name in shared:
        start = found[name].astype(np.float64)
        found[name] = (start + keep * (learned[name].astype(np.float64) - start)).astype(never[name].dtype)
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def hand_over(way: Way, path: Path) -> Path:
    """Write a study for `wardround submit`, with the release that it starts from beside it; its path.

    Raises `StudyError` where there is such a study already.
    """
    if path.exists():
        raise StudyError("--out: holds such a study already; choose another folder", detail=str(path))
    said = written(way.study)
    if isinstance(way.study.start, FromRelease):
        release = Release.at(way.near / way.study.start.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(release.model, path.parent / START)
        if (frozen := release.frozen_part) is not None:
            shutil.copyfile(frozen, path.parent / frozen.name)
        said["start"]["file"] = START
    write_text(path, yaml.safe_dump(said, sort_keys=False, allow_unicode=True))
    return path


def study_that_had(site: str, release: Path, chain: Chain | None = None) -> tuple[Study, Path]:
    """The study of the newest release in which a site trained, and the folder that its files are relative to.

    Its patients are dealt as they were then. Raises `StudyError` where it trained none of them.
    """
    for one in lineage(release, chain)[0]:
        if site in one.study.training_sites:
            return one.study, near_in(one.path.parent.parent)
    raise StudyError(f"site {site} trained neither this release nor one before it")


def forget_exactly(
    way: Way, sites: SitesFile, out: Path, *, watcher: Watcher | None = None, engine: str | None = None
) -> Result:
    """Carry out what `exact` gives; raises as `run`."""
    return run(way.study, _other_start(way.study, sites), out, near=way.near, watcher=watcher, engine=engine)


def forget_approximately(
    plan: Approximately, sites: SitesFile, out: Path, *, watcher: Watcher | None = None, engine: str | None = None
) -> Result:
    """Carry out what `approximate` gives, into folders of `out`; raises as `run`. Stopped, it goes on by itself."""
    model = plan.model
    if plan.ascent is not None:
        asked = _other_start(plan.ascent.study, sites)
        run(plan.ascent.study, asked, out / UNLEARNED, near=plan.ascent.near, watcher=watcher, engine=engine)
        model = model_in(out / UNLEARNED)
    way = shrunk(plan, model, sites, out)
    return run(way.study, _without_start(sites), out / RECOVERED, near=out, watcher=watcher, engine=engine)


def nowhere(study: Study) -> SitesFile:
    """A sites file of a coordinator, who has nobody's data."""
    return SitesFile(sites={name: SiteData(data=(Path(),)) for name in study.sites})


def _other_start(study: Study, sites: SitesFile) -> SitesFile:
    """The sites, without their own copies of the file that the study started from, where it starts from a release."""
    return _without_start(sites) if isinstance(study.start, FromRelease) else sites


def _without_start(sites: SitesFile) -> SitesFile:
    found = sites.model_copy(
        update={"sites": {name: entry.model_copy(update={"start": None}) for name, entry in sites.sites.items()}}
    )
    return found.with_code() if sites.allows_code else found


def _check_took_part(site: str, ancestors: Sequence[Ancestor], whole: bool) -> None:
    if site in left_by(open_model(ancestors[0].path)[1]):
        raise StudyError(f"site {site} left this release, or one before it, already: there is nothing to forget")
    if not any(site in one.study.training_sites for one in ancestors):
        known = ", ".join(sorted({name for one in ancestors for name in one.study.training_sites}))
        if not whole:
            raise StudyError(
                f"site {site} trained none of the releases whose files were found (trained by {known}), and the model "
                "that the oldest of them began with is no longer where it was: name the release that the site trained, "
                "or the chain of releases (--chain)"
            )
        raise StudyError(f"site {site} trained neither this release nor one before it; those who did are {known}")


def _section(site: str, release: str, how: str, approved_by: Sequence[str]) -> dict[str, Any]:
    if not approved_by:
        raise StudyError(
            f"--approved-by: nobody is named. The new model and the released one together reveal what {site} "
            f"contributed: ask every site of the study, and {site}, and name them"
        )
    return {"site": site, "release": release, "how": how, "approved_by": list(approved_by)}


def _without(study: Study, site: str) -> dict[str, Any]:
    """What a study says, without a site. Raises `StudyError` where it is nothing without it."""
    said: dict[str, Any] = json.loads(json.dumps(written(study)))
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

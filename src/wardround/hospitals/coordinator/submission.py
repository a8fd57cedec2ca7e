"""Submitting a study to a federation: it is checked here, then lies on the coordinator's disk until it is done."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from wardround.errors import JournalError, StudyError
from wardround.hospitals.federation import load_federation
from wardround.hospitals.folders import CoordinatorFolder, StudyFolder
from wardround.hospitals.proposal import start_of, teacher_of
from wardround.hospitals.roster import SignedRoster
from wardround.plan.arms import POOLED
from wardround.runs.context import Context
from wardround.study.base import Config
from wardround.study.load import load_study, written
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.wire.files import refuse_links, sync_folder, write_text
from wardround.wire.lines import locked

# A study's name is one of a folder, too.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOCK = ".lock"


class Submission(Config):
    """What a coordinator's people want of a study: `submission.json`. Commands write it, the service reads it."""

    version: Literal[1] = 1
    study_sha256: str
    plan_sha256: str
    compare: tuple[str, ...] = ()
    near: str
    plugins: tuple[str, ...] = ()
    #: Whether the study may name any code: for people who wrote it, in Python, on their own machines.
    allow_code: bool = False
    submitted: float
    without: tuple[str, ...] = ()
    withdrawn: bool = False
    #: How often people asked that it goes on.
    resumed: int = 0

    def context(self, folder: StudyFolder) -> Context:
        """The study of a folder as its coordinator knows it; raises `StudyError` where its file was changed."""
        study = load_study(folder.study, near=self.near)
        allowed = Plugins({"coordinator": frozenset(self.plugins)}, self.allow_code)
        places = study.places(Path(self.near))
        return Context(study, folder.out, self.compare, self.without, allowed, places=places)


def is_name(name: str) -> bool:
    """Whether a text may be the name of a submitted study, and of its folder."""
    return _NAME.fullmatch(name) is not None


def study_folder(folder: CoordinatorFolder, name: str) -> StudyFolder:
    """The folder of a submitted study; raises `StudyError` for a name that none can have, or that none has."""
    found = StudyFolder(folder.studies / name)
    if not is_name(name) or not found.submission.is_file():
        known = ", ".join(submitted(folder)) or "none"
        raise StudyError(f"no study of this name was submitted; there are {known}", detail=name)
    return found


def submitted(folder: CoordinatorFolder) -> tuple[str, ...]:
    """The names of all submitted studies, the oldest first; anything else that lies there is left alone."""
    found = []
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder.studies):
            if is_name(entry.name) and entry.is_dir(follow_symlinks=False):
                file = StudyFolder(Path(entry.path)).submission
                if file.is_file() and not file.is_symlink():
                    with suppress(JournalError):
                        found.append((read_submission(StudyFolder(Path(entry.path))).submitted, entry.name))
    return tuple(name for _, name in sorted(found))


def read_submission(folder: StudyFolder) -> Submission:
    """What people want of a study; raises `JournalError` where the file is not one of ours."""
    try:
        return Submission.model_validate_json(folder.submission.read_bytes())
    except (OSError, ValidationError):
        raise JournalError(
            "submission.json of a study cannot be read: restore it, or move the folder away and submit the study again",
            detail=str(folder.submission),
        ) from None


def checked(study: Study, compare: Sequence[str], plugins: Plugins, near: Path, roster: SignedRoster) -> Context:
    """The study where hospitals can take part in it; raises `StudyError` for what would stop it, and why.

    Builds the study's model once, and looks for the file that it starts from.
    """
    if POOLED in compare:
        raise StudyError("--compare pooled: needs the data of all sites in one place, and these stay apart")
    if scanning := next((name for name, site in study.sites.items() if site.scans), None):
        raise StudyError(f"sites.{scanning}.scans: needs patients of other sites in one place, and these stay apart")
    if strange := [name for name in study.sites if name not in roster.keys]:
        raise StudyError(
            f"sites.{strange[0]}: is no site of this federation (it has {', '.join(sorted(roster.keys)) or 'none'}); "
            "write its name as it was invited, or invite and admit it first"
        )
    context = Context(study, Path(), tuple(compare), plugins=plugins, places=study.places(near))
    if why := next(context.plugins.refused(study), None):
        raise StudyError(f"{why}. At a coordinator: --plugin NAME")
    start_of(context.study)
    teacher_of(context.study)
    for name in context.arms:
        context.arm_spec(name)
    return context


def submit(
    folder: CoordinatorFolder,
    source: Path,
    *,
    name: str | None = None,
    compare: Sequence[str] = (),
    overrides: Sequence[str] = (),
    plugins: Collection[str] = (),
    allow_code: bool = False,
) -> tuple[str, bool]:
    """Check a study and put it where the coordinator's process finds it; its name, and whether it is new.

    `plugins` are installed entry points that the study may name at the coordinator; `allow_code` lets it name any code,
    which sites then decide on by themselves. The same study once more is nothing new. Raises `StudyError` for what
    would stop it, and where another study has its name.
    """
    federation = load_federation(folder.federation)
    roster = SignedRoster.load(folder.roster)
    roster.verify(bytes.fromhex(federation.root_key))
    study, near = load_study(source, overrides), source.parent.absolute()
    name = study.name if name is None else name
    if not is_name(name):
        raise StudyError(f"--name {name}: take letters, digits, dots, hyphens and underscores, 64 at most")
    allowed = Plugins({"coordinator": frozenset(plugins)}, allow_code)
    context = checked(study, compare, allowed, near, roster)
    submission = Submission(
        study_sha256=context.study_sha256,
        plan_sha256=context.plan_sha256,
        compare=tuple(sorted(set(compare))),
        near=str(near),
        plugins=tuple(sorted(set(plugins))),
        allow_code=allow_code,
        submitted=time.time(),
    )
    refuse_links(folder.studies)
    place = StudyFolder(folder.studies / name)
    with locked(folder.studies / _LOCK):
        if os.path.lexists(place.root):
            _require_same(place, submission, name)
            return name, False
        _place(place, context.study, submission)
    return name, True


def withdraw(folder: CoordinatorFolder, name: str) -> bool:
    """Stop a study; whether that was news. What it has committed stays, and `resume` lets it go on."""
    return _change(folder, name, withdrawn=True)


def resume(folder: CoordinatorFolder, name: str, without: Collection[str] = ()) -> bool:
    """Let a study that stopped, was refused or was withdrawn go on, for good `without` some sites; always news.

    Raises `StudyError` for a site that the study does not have.
    """
    place = study_folder(folder, name)
    before = read_submission(place)
    left = sorted({*before.without, *without})
    before.model_copy(update={"without": tuple(left)}).context(place)
    return _change(folder, name, withdrawn=False, resumed=before.resumed + 1, without=tuple(left))


def _change(folder: CoordinatorFolder, name: str, **values: object) -> bool:
    place = study_folder(folder, name)
    with locked(folder.studies / _LOCK):
        before = read_submission(place)
        after = before.model_copy(update=values)
        write_text(place.submission, after.model_dump_json(indent=2) + "\n", durable=True)
    return after != before


def _require_same(place: StudyFolder, submission: Submission, name: str) -> None:
    """Raise `StudyError` where something else has the name."""
    if place.root.is_symlink() or not place.submission.is_file():
        raise StudyError(f"something else lies where the study {name} belongs; choose --name", detail=str(place.root))
    there = read_submission(place)
    keys = ("study_sha256", "plan_sha256", "compare", "plugins")
    if any(getattr(there, key) != getattr(submission, key) for key in keys):
        raise StudyError(f"another study, or another --compare, was submitted as {name}; choose --name")


def _place(place: StudyFolder, study: Study, submission: Submission) -> None:
    """Put a study's folder there, whole or not at all."""
    draft = StudyFolder(place.root.with_name(f".draft-{secrets.token_hex(8)}"))
    try:
        draft.out.mkdir(parents=True)
        write_text(draft.study, yaml.safe_dump(written(study), sort_keys=False, allow_unicode=True), durable=True)
        write_text(draft.submission, submission.model_dump_json(indent=2) + "\n", durable=True)
        draft.root.rename(place.root)
    except BaseException:
        shutil.rmtree(draft.root, ignore_errors=True)
        raise
    sync_folder(place.root.parent)

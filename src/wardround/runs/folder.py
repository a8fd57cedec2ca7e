"""The folder of a run: one process at a time, one study, and what every process that worked on it was made of."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from wardround.errors import JournalError
from wardround.plan.versions import PLACED, fingerprint
from wardround.runs.context import Context
from wardround.study.hashes import differing, study_sha256
from wardround.study.hashes import written as what_is_written
from wardround.study.load import load_study
from wardround.wire.canonical import digest
from wardround.wire.files import refuse_links, write_text

log = logging.getLogger(__name__)
Fingerprint = Mapping[str, str]


# What the lock of a run's folder holds: without it, or the list of its arms, the folder is somebody else's.
_MARK = b"wardround run\n"
_ARMS, _WITHOUT, _FINGERPRINT, _NEAR = "compare.json", "without.json", "fingerprint.json", "near.json"
# The study with all defaults of the version that began the run.
_PLAN = "plan.json"


def refuse_foreign(out: Path, *, ours: bool) -> None:
    """Refuse a folder that is neither absent, nor empty, nor `ours`: its files and new ones would be mixed.

    Raises `JournalError`, whose detail names what lies in the way; nothing is written.
    """
    if ours or not os.path.lexists(out):
        return
    if not out.is_dir():
        raise JournalError("a file lies where the folder of results belongs; choose another --out", detail=str(out))
    if found := sorted(os.listdir(out)):
        raise JournalError(
            "the folder holds files that are not of this run or audit, and nothing was written into it; choose another "
            "--out, or move them away",
            detail=str(out / found[0]),
        )


def reserve(out: Path) -> Path:
    """Make the folder of a run, or find that it is one; its lock file.

    Raises `JournalError` where it holds anything else, or a symbolic link where a run keeps its own files.
    """
    work = out / "work"
    lock = work / "lock"
    refuse_foreign(out, ours=_is_ours(out, work, lock))
    for top in (work, out / "models", out / "sites"):
        refuse_links(top)
        for folder, folders, files in os.walk(top):
            refuse_links(*(Path(folder) / name for name in (*folders, *files)))
    work.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        if not file.tell():
            file.write(_MARK)
    return lock


def _is_ours(out: Path, work: Path, lock: Path) -> bool:
    if (work / _ARMS).is_file() or (lock.is_file() and lock.read_bytes() == _MARK):
        return True
    # A process that was killed at once has left no more than that.
    return work.is_dir() and os.listdir(out) == [work.name] and set(os.listdir(work)) <= {lock.name}


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep a second process out of the folder: two of them would delete each other's files.

    Raises `JournalError` while another is at work, and as `reserve` does.
    """
    with reserve(out).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError("another run is at work in this folder; wait for it, or choose another --out") from None
        yield


def claim(host: Context, *, resume: bool) -> list[Fingerprint]:
    """Take the folder for this study, or find that it holds a run of the same study to go on with.

    Returns the fingerprints that the run was worked on with, the present one last, and warns where there are several.
    Raises `JournalError` for a run of another study or comparison, or one that began with other defaults, and with
    `resume` where there is none.
    """
    out = host.out
    written = out / "study.yaml"
    if written.exists():
        if study_sha256(load_study(written)) != host.study_sha256:
            raise JournalError(
                "the folder holds a run of another study: choose another --out, or restore the study as it was",
                detail=str(out),
            )
        if digest(plan_of_run(out)) != host.plan_sha256:
            raise other_defaults(host)
        previous = out / "work" / _ARMS
        if previous.exists() and json.loads(previous.read_text(encoding="utf-8")) != sorted(host.asked):
            raise JournalError("the folder holds a run with another --compare: choose another --out", detail=str(out))
    elif resume:
        raise JournalError("--resume: the folder holds no run to go on with", detail=str(out))
    elif host.without:
        raise JournalError(
            "--without: the folder holds no run to go on with; take the site out of the study, and start without it",
            detail=str(out),
        )
    write_text(out / "work" / _ARMS, json.dumps(sorted(host.asked)))
    record_without(out, host.without)
    if not written.exists():
        write_text(out / "work" / _PLAN, json.dumps(host.study.model_dump(mode="json")) + "\n", durable=True)
    write_text(written, yaml.safe_dump(what_is_written(host.study), sort_keys=False, allow_unicode=True))
    return _add_fingerprint(out / "work" / _FINGERPRINT)


def other_defaults(host: Context) -> JournalError:
    """What to say of a run of the same study that began with other defaults than this version fills in."""
    keys = differing(plan_of_run(host.out), host.study.model_dump(mode="json"))
    return JournalError(
        "the run in the folder is of the same study, and this version of Wardround (or of a plug-in) fills in other "
        f"defaults than the one that began it{f' ({keys})' if keys else ''}: go on with that version, or choose "
        "another --out",
        detail=str(host.out / "work" / _FINGERPRINT),
    )


def plan_of_run(out: Path) -> Any:
    """The resolved study of the run in a folder; raises `JournalError` where it is lost."""
    try:
        return json.loads((out / "work" / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise JournalError(
            f"work/{_PLAN} of the run is lost: restore it, or choose another --out", detail=str(out)
        ) from None


def without_in(out: Path) -> frozenset[str]:
    """The sites that the run in a folder goes on without, as was decided when it was resumed before."""
    path = out / "work" / _WITHOUT
    return frozenset(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else frozenset()


def record_without(out: Path, sites: Collection[str]) -> None:
    """Write down which sites a run goes on without: a later process goes on without them, too."""
    if sites:
        write_text(out / "work" / _WITHOUT, json.dumps(sorted(sites)) + "\n", durable=True)


def record_near(host: Context, near: Path) -> None:
    """Write down, for a later evaluation, the folder to which the paths in the study are relative, where it has any."""
    if host.places.start or host.places.teacher:
        write_text(host.out / "work" / _NEAR, json.dumps(str(near)) + "\n")


def near_in(out: Path) -> Path:
    """The folder to which the paths in the study of a run are relative."""
    path = out / "work" / _NEAR
    return Path(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else out


def _add_fingerprint(path: Path) -> list[Fingerprint]:
    present = fingerprint()
    known: list[Fingerprint] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = [*(each for each in known if each != present), present]
    write_text(path, json.dumps(found, indent=2) + "\n")
    for note in mixed(found):
        log.warning("%s", note)
    return found


def add_devices(out: Path, fingerprints: Sequence[Fingerprint], placed: Fingerprint) -> list[Fingerprint]:
    """The fingerprints of a run, the present one with where its sites compute, which they say after `claim`."""
    present = {**fingerprints[-1], **placed}
    found = [*(each for each in fingerprints[:-1] if each != present), present]
    write_text(out / "work" / _FINGERPRINT, json.dumps(found, indent=2) + "\n")
    for note in mixed(found):
        if note not in mixed(fingerprints):
            log.warning("%s", note)
    return found


def mixed(fingerprints: Sequence[Fingerprint]) -> list[str]:
    """What to say of a run that was not worked on with one fingerprint alone; nothing of any other."""
    keys = dict.fromkeys(key for each in fingerprints for key in each)
    # A process that ended before its sites answered knows nothing of their devices.
    values = {
        key: list(dict.fromkeys(each.get(key, "unknown") for each in fingerprints if key in each or key not in PLACED))
        for key in keys
    }
    differing = "; ".join(f"{key} {' and '.join(found)}" for key, found in values.items() if len(found) > 1)
    if not differing:
        return []
    return [
        f"the run was resumed with other versions or on another machine ({differing}): a run of the same study in one "
        "go need not give the same bits"
    ]

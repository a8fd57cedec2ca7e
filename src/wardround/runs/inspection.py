"""What a released model is, for people who have nothing but its file, and how far a run has come."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from wardround.errors import JournalError
from wardround.federation.release import load_model, model_path, study_of
from wardround.plan.arms import FEDERATED, arms_of
from wardround.plan.weights import FROZEN, FROZEN_SHA256
from wardround.results.files import RESULT_FILE, read_result, read_rounds
from wardround.runs.columns import entry, table
from wardround.runs.folder import plan_of_run
from wardround.runs.protocols import lines, read_protocols
from wardround.runs.remarks import remarks_on_missing
from wardround.study.load import UNREAD, load_study, study_sha256
from wardround.study.rules import optional_contrasts
from wardround.study.schema import Study
from wardround.wire.canonical import digest


def inspect_model(path: Path) -> str:
    """What a released model is and which scanners it was trained on, for people. Raises `DataError`."""
    tensors, metadata = load_model(path)
    study = study_of(path, metadata)
    kind = getattr(study.model, "kind", "")
    subject = study.scanner.kind.upper() if study.scans else study.task.kind
    heading = (
        "a released model",
        f"study {study.name}, arm {metadata.get('arm', FEDERATED)}, round {metadata.get('round', 'unknown')}",
        f"study_sha256 {metadata.get('study_sha256', 'unknown')}",
        f"plan_sha256 {metadata.get('plan_sha256', 'unknown')}",
        f"{subject}, {kind}: {sum(tensor.size for tensor in tensors.values()):,} values; {study.method.kind}",
        f"started from {study.start.describe()}",
        *([] if (teacher := study.task.taught_by) is None else [f"taught by {teacher.describe()}"]),
        *remarks_on_missing(study),
        *_does_without(study),
        *_frozen(metadata),
    )
    return "\n  ".join((*heading, *lines(read_protocols(metadata, study))))


def _does_without(study: Study) -> tuple[str, ...]:
    """Which contrasts a patient may lack in `wardround predict`; nothing where none."""
    images = study.task.may_lack
    spare = [images[number] for number in sorted(optional_contrasts(study))]
    return (f"predicts for patients without {' or '.join(spare)}, too; one contrast must be there",) if spare else ()


def _frozen(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What of a model is not in its file; nothing where it holds all of its values."""
    if FROZEN_SHA256 not in metadata:
        return ()
    names = metadata[FROZEN].split(" ")
    return (f"{len(names)} frozen tensors beside these, in weights/{metadata[FROZEN_SHA256]}.safetensors",)


def inspect_run(out: Path) -> str:
    """The state of a run, its sites, and the rounds and models of its arms. Reads only.

    Raises `StudyError` for the study and `JournalError` for result files that are damaged or of another version.
    """
    study = load_study(out / "study.yaml", reading=UNREAD)
    finished = read_result(out) if (out / RESULT_FILE).exists() else None
    arms = arms_of(study, tuple(sorted(_compared(out) & {"local", "pooled"})))
    done = Counter(line.arm for line in read_rounds(out))
    released = {} if finished is None else finished.selected_round
    rows = [
        (arm.name, f"{done[arm.name]} of {study.schedule.rounds}", _model_of(out, arm.folder, released.get(arm.name)))
        for arm in arms
    ]
    if finished is not None:
        state = "finished; report.html"
    elif _at_work(out):
        state = "at work"
    else:
        state = "stopped; run the same command again to go on"
    unseen = f"; only validate and test: {', '.join(study.evaluating_sites)}" if study.evaluating_sites else ""
    unseen += f"; only tested: {', '.join(study.unseen_sites)}" if study.unseen_sites else ""
    return "\n".join(
        (
            f"a run of study {study.name}",
            entry("state", state),
            entry("study_sha256", study_sha256(study)),
            entry("plan_sha256", _plan_sha256(out)),
            *_roster(out),
            entry("sites", f"{', '.join(study.training_sites)}{unseen}" if study.trains else ", ".join(study.sites)),
            *([] if study.trains else [entry("measured", f"{study.start.describe()}; nothing is trained")]),
            "",
            table(("arm", "rounds", "model"), rows),
        )
    )


def _model_of(out: Path, folder: str, number: int | None) -> str:
    path = model_path(out, folder)
    if not path.exists():
        return "not yet released"
    return f"models/{folder}.safetensors" + ("" if number is None else f", of round {number}")


def _roster(out: Path) -> list[str]:
    """The hash of the sites' keys, which hospitals compare, where the run sums under masks."""
    try:
        keys = json.loads((out / "work" / "arms" / FEDERATED / "roster.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry("roster", digest(keys))]


def _plan_sha256(out: Path) -> str:
    try:
        return digest(plan_of_run(out))
    except JournalError:
        return "not known: work/plan.json is lost"


def _compared(out: Path) -> set[str]:
    try:
        asked: list[str] = json.loads((out / "work" / "compare.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return {name.partition("/")[0] for name in asked}


def _at_work(out: Path) -> bool:
    """Whether a process holds the folder's lock."""
    try:
        with (out / "work" / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

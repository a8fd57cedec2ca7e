"""The folder of a run: one process at a time, one study, and what every process that worked on it was made of."""

from __future__ import annotations

import fcntl
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from wardround.errors import JournalError
from wardround.runner.host import Host
from wardround.study.load import load_study
from wardround.wire.files import write_text

log = logging.getLogger(__name__)
Fingerprint = Mapping[str, str]


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep a second process out of the folder: two of them would delete each other's files.

    Raises `JournalError` while another is at work.
    """
    (out / "work").mkdir(parents=True, exist_ok=True)
    with (out / "work" / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError("another run is at work in this folder; wait for it, or choose another --out") from None
        yield


def claim(host: Host, *, resume: bool) -> list[Fingerprint]:
    """Take the folder for this study, or find that it holds a run of the same study to go on with.

    Returns the fingerprints that the run was worked on with, the present one last, and warns where there are several.
    Raises `JournalError` for a run of another study or comparison, and with `resume` where there is none.
    """
    out = host.out
    written = out / "study.yaml"
    if written.exists():
        known = load_study(written)
        if known != host.study:
            raise JournalError(
                "the folder holds a run of another study: choose another --out, or restore the study as it was",
                detail=str(out),
            )
        previous = out / "work" / "compare.json"
        if previous.exists() and json.loads(previous.read_text(encoding="utf-8")) != sorted(host.arms):
            raise JournalError("the folder holds a run with another --compare: choose another --out", detail=str(out))
    elif resume:
        raise JournalError("--resume: the folder holds no run to go on with", detail=str(out))
    write_text(out / "work" / "compare.json", json.dumps(sorted(host.arms)))
    write_text(written, yaml.safe_dump(host.study.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    return _add_fingerprint(out / "work" / "fingerprint.json")


def _add_fingerprint(path: Path) -> list[Fingerprint]:
    present = fingerprint()
    known: list[Fingerprint] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = [*(each for each in known if each != present), present]
    write_text(path, json.dumps(found, indent=2) + "\n")
    for note in mixed(found):
        log.warning("%s", note)
    return found


def mixed(fingerprints: Sequence[Fingerprint]) -> list[str]:
    """What to say of a run that was not worked on with one fingerprint alone; nothing of any other."""
    keys = dict.fromkeys(key for each in fingerprints for key in each)
    values = {key: list(dict.fromkeys(each.get(key, "unknown") for each in fingerprints)) for key in keys}
    differing = "; ".join(f"{key} {' and '.join(found)}" for key, found in values.items() if len(found) > 1)
    if not differing:
        return []
    return [
        f"the run was resumed with other versions or on another machine ({differing}): a run of the same study in one "
        "go need not give the same bits"
    ]


def fingerprint() -> dict[str, str]:
    """What must be the same for the same bits: versions and the kind of processor."""
    import numpy
    import torch

    import wardround

    return {
        "wardround": wardround.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }

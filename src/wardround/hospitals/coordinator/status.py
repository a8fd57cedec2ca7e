"""What a coordinator's process says of itself in `status.json`, and keeps of each study in `record.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from wardround.errors import JournalError
from wardround.study.base import Config
from wardround.wire.files import write_text

#: asking: not every site has decided; stopped: goes on with `submit --resume`, or when who is missing is back.
State = Literal["asking", "running", "stopped", "refused", "withdrawn", "finished"]
PresenceState = Literal["present", "late", "lost", "never"]
# A process that wrote nothing for this long is not at work.
STALE_SECONDS = 20.0


class Said(Config):
    """What a site said when it was asked for a study; `asked`: not yet, or it did not answer."""

    state: Literal["asked", "pending", "approved", "refused"] = "asked"
    reason: str = ""


class Record(Config):
    """How far a study is: the coordinator's process writes it before it acts on it."""

    version: Literal[1] = 1
    state: State = "asking"
    reason: str = ""
    #: By site, what it said last.
    said: dict[str, Said] = Field({})
    #: Of the wishes to go on (`Submission.resumed`), how many were heard.
    resumed: int = 0
    #: Sites that were away when the study stopped: it goes on when enough of them are back.
    waits_for: tuple[str, ...] = ()
    #: Sites that did not get the released model yet.
    undelivered: tuple[str, ...] = ()
    released: float | None = None


class SiteStatus(Config):
    """A site of the federation as the coordinator sees it."""

    name: str
    state: PresenceState
    seen: float | None = None
    waiting: int = 0
    #: Unix time at which its certificate expires, where a copy of it is here.
    certificate_until: float | None = None


class Heard(Config):
    """A site's last sign of work in a study."""

    arm: str
    round: int
    step: int
    steps: int


class ArmStatus(Config):
    """How far an arm is."""

    name: str
    round: int
    loss: float | None = None
    validation: dict[str, float] = Field({})


class LeftOut(Config):
    """A site that rounds of the federation went on without."""

    rounds: int
    reason: str


class StudyStatus(Config):
    """A submitted study."""

    name: str
    study_sha256: str
    plan_sha256: str = ""
    description: str = ""
    submitted: float
    state: State
    reason: str = ""
    phase: str = ""
    rounds: int = 0
    training_sites: tuple[str, ...] = ()
    sites: dict[str, Said] = Field({})
    #: Names of the task's metrics, the one that answers the question first; empty until they are known.
    metrics: tuple[str, ...] = ()
    arms: tuple[ArmStatus, ...] = ()
    participants: tuple[str, ...] = ()
    #: Who was left out of the last round, and why.
    missing: dict[str, str] = Field({})
    #: Who was at work on an older round when the last one was committed, and on which: rounds did not wait for them.
    at_work: dict[str, int] = Field({})
    left_out: dict[str, LeftOut] = Field({})
    working: dict[str, Heard] = Field({})
    seconds_a_round: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    #: By site, once the sites said it; the budget is the study's.
    epsilon: dict[str, float] = Field({})
    budget: float | None = None
    secure: bool = False
    log_records: int = 0
    log_head: str = ""
    site_heads: dict[str, str] = Field({})
    model_sha256: str = ""
    undelivered: tuple[str, ...] = ()
    #: A study that stopped goes on when enough of them are back.
    waits_for: tuple[str, ...] = ()


class Event(Config):
    """Something that happened, in a line."""

    at: float
    text: str


class Process(Config):
    """The coordinator's process."""

    state: Literal["running", "ended"]
    pid: int
    version: str
    began: float
    at: float
    carrier: str
    address: str
    page: str = ""
    certificate_until: float | None = None


class Status(Config):
    """`status.json`."""

    version: Literal[1] = 1
    federation: str
    process: Process
    sites: tuple[SiteStatus, ...] = ()
    studies: tuple[StudyStatus, ...] = ()
    events: tuple[Event, ...] = ()

    def alive(self, now: float) -> bool:
        """Whether the process that wrote it is still at work, at a unix time."""
        return self.process.state == "running" and now - self.process.at < STALE_SECONDS

    def study(self, name: str) -> StudyStatus | None:
        """The study of a name."""
        return next((study for study in self.studies if study.name == name), None)


def read_status(path: Path) -> Status | None:
    """What a coordinator's process last said; nothing where none was ever started.

    Raises `JournalError` where the file is not one of this version.
    """
    try:
        return Status.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise JournalError(
            "status.json of the federation cannot be read; start the coordinator again, which writes it anew",
            detail=str(path),
        ) from None


def read_record(path: Path) -> Record:
    """How far a study is; at its beginning where nothing was written. Raises `JournalError` for a damaged file."""
    try:
        return Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Record()
    except (OSError, ValidationError):
        raise JournalError(
            "record.json of a study cannot be read: restore it, or delete it", detail=str(path)
        ) from None


def write_record(path: Path, record: Record) -> None:
    """Keep how far a study is, through a power cut."""
    write_text(path, record.model_dump_json(indent=2) + "\n", durable=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file. Raises `JournalError` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise JournalError(f"{path.name} is no JSON object: restore it, or delete it", detail=str(path))
    return found

"""The errors Wardround raises on purpose.

    WardroundError
    ├── StudyError          the study or sites file is wrong: names the key and the fix
    ├── DataError           a site's data cannot be used: names what is wrong, never whose scan it is
    ├── GeometryError       an acquisition does not describe a possible measurement
    ├── WireError           bytes that came over the seam are not what their header says
    │   └── Rejected        a well-formed message that a gate refuses: names the gate
    ├── JournalError        the record of a run does not fit what is being run
    ├── Withheld            a site's own rules keep something from leaving
    ├── NotEnoughSites      a round cannot go on
    ├── Interrupted         the run was stopped cleanly and can be resumed
    └── MissingExtra        an optional part is not installed: names the command that installs it

Those that a caller tells apart are declared where they arise: `exchange.Aborted` (a round is used up and trained anew),
`secure_coordinator.Unrecoverable`, `agreement.Misbehaviour`, `privacy.BudgetSpent`, `training.TrainingFailed`.

A message that may leave a site is built from fixed text, tensor names and numbers only. Paths and patient
identifiers go to `detail`, which stays on the machine where the error was raised.
"""

from __future__ import annotations


class WardroundError(Exception):
    """Base of all errors raised on purpose; `str(error)` is safe to send, `error.detail` is for local eyes."""

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class StudyError(WardroundError):
    """The study or sites file is wrong."""


class DataError(WardroundError):
    """A site's data cannot be used."""


class GeometryError(WardroundError):
    """An acquisition does not describe a possible measurement."""


class WireError(WardroundError):
    """Bytes that came over the seam are not what their header says."""


class Rejected(WireError):
    """A gate refuses a well-formed message."""


class JournalError(WardroundError):
    """The record of a run does not fit what is being run."""


class Withheld(WardroundError):
    """A site's own rules keep an answer, or a part of one, from leaving."""


class NotEnoughSites(WardroundError):
    """A round cannot go on with the sites that are left."""


class Interrupted(WardroundError):
    """The run was stopped cleanly and can be resumed."""


class MissingExtra(WardroundError):
    """An optional part is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional part: pip install 'wardround[{extra}]'")

"""Which masked sums a site has been part of, over all rounds, runs and studies: `masked.jsonl` in its history folder.

Two sums from one start over sites that differ by a few give away, by difference, what those few sent. No single run can
see that; the site can. A record is on disk before the site consents to a sum, and is never deleted with a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from wardround.errors import JournalError, Rejected
from wardround.wire.canonical import canonical_json
from wardround.wire.lines import locked, whole_lines

MASKED = "masked.jsonl"


@dataclass(frozen=True)
class Joined:
    """A masked sum that a site consented to, or is asked for.

    `start` is the hash of the model that was sent out. `survivors` are the sites in the sum; none yet where it has only
    begun. `study` and `round` are for people: the same start in another study counts as well.
    """

    start: str
    site: str
    roster: tuple[str, ...]
    survivors: tuple[str, ...]
    threshold: int
    study: str = ""
    round: int = 0

    @property
    def telling(self) -> tuple[object, ...]:
        """What tells two sums apart."""
        return (self.start, self.site, self.roster, self.survivors, self.threshold)

    def fault(self, known: Joined) -> str | None:
        """Why this sum may not stand beside a recorded one; nothing where it may.

        Of two sums from one start, the sites in one and not in the other must be none, or as many as the larger of the
        two thresholds.
        """
        if known.start != self.start:
            return None
        if self.site not in known.roster and known.site not in self.roster:
            return (
                f"its history holds a sum from the same model under the name {known.site}, and sites by other names "
                "cannot be compared. Give each site a history folder of its own, or the study another seed"
            )
        least = max(self.threshold, known.threshold)
        pairs = [("on the roster", self.roster, known.roster)]
        if self.survivors:
            pairs.append(("in the sum", self.survivors, known.survivors))
        for where, ours, theirs in pairs:
            apart = sorted(set(ours) ^ set(theirs))
            if 0 < len(apart) < least:
                return (
                    f"it was part of a sum from the same model with {', '.join(theirs)} {where}, now it is asked for "
                    f"one with {', '.join(ours)}: the difference would be what {', '.join(apart)} sent. Train with the "
                    "same sites, or give the study another seed"
                )
        return None


class MaskedHistory:
    """The record of one site; it may be written by several processes and studies at once.

    Raises `JournalError` where the file cannot be read or written, or was changed: a site that does not know what it
    was part of joins no masked sum.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, asked: Joined) -> None:
        """Raise `Rejected` where the sum would tell too much beside one on record; writes nothing."""
        if self.path.exists():
            with self._open() as file:
                _refuse(asked, self._read(file))

    def join(self, asked: Joined) -> None:
        """Put a sum on record, durably, before the site consents to it; raises `Rejected` as `check` does."""
        with self._open() as file:
            known = list(self._read(file))
            _refuse(asked, known)
            if all(one.telling != asked.telling for one in known):
                file.write(canonical_json(asdict(asked)) + b"\n")
                file.flush()
            # Also of a line that another process wrote and may not have synced before it died.
            os.fsync(file.fileno())

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, locked."""
        try:
            with locked(self.path) as file:
                yield file
        except OSError as error:
            cause = os.strerror(error.errno) if error.errno else type(error).__name__
            raise JournalError(
                f"a site's history of masked rounds cannot be read or written ({cause}); check its folder and the "
                "disk, then resume",
                detail=str(self.path),
            ) from error

    def _read(self, file: BinaryIO) -> Iterator[Joined]:
        # The site had not consented to the sum of a line that is not whole.
        for line in whole_lines(file).splitlines():
            yield self._parse(line)

    def _parse(self, line: bytes) -> Joined:
        try:
            value: dict[str, Any] = json.loads(line)
            value |= {name: tuple(value[name]) for name in ("roster", "survivors")}
            return Joined(**value)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise JournalError(
                "a site's history of masked rounds was changed: a line is no record; restore the newest copy. Without "
                "it the site cannot tell which sums would give another site away",
                detail=str(self.path),
            ) from None


def _refuse(asked: Joined, known: Iterable[Joined]) -> None:
    for one in known:
        if (fault := asked.fault(one)) is not None:
            raise Rejected(f"site {asked.site} does not join this masked sum: {fault}")

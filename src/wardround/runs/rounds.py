"""rounds.jsonl: a line for each committed round of every arm, there from the moment the round is committed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from wardround.results.files import ROUNDS_FILE, line_of
from wardround.storage.journal import RoundReport


class RoundsFile:
    """The file grows as rounds commit; it holds each committed round once, arm by arm in the order of `arms`.

    It is always whole: each change is written beside it and renamed over it. It need not survive a power cut, for a
    resumed run makes it again from the journals. Its methods may be called from any thread. Raises `OSError` where the
    disk is full.
    """

    def __init__(self, out: Path, arms: Sequence[str]) -> None:
        self._path = out / ROUNDS_FILE
        self._lines: dict[str, dict[int, str]] = {arm: {} for arm in arms}
        self._lock = threading.Lock()

    def put(self, reports: Iterable[RoundReport]) -> list[RoundReport]:
        """Add or replace the lines of rounds and write the file; returns the reports that say something new."""
        with self._lock:
            lines = [(report, line_of(report)) for report in reports]
            new = [report for report, line in lines if self._lines[report.arm].get(report.round) != line]
            for report, line in lines:
                self._lines[report.arm][report.round] = line
            if new or not self._path.exists():
                self._write()
        return new

    def _write(self) -> None:
        draft = self._path.with_name(self._path.name + ".draft")
        with draft.open("w", encoding="utf-8") as file:
            for lines in self._lines.values():
                file.writelines(lines[number] for number in sorted(lines))
        os.replace(draft, self._path)

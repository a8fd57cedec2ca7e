"""What a process says on its stderr, which services and batch jobs keep for others to read."""

from __future__ import annotations

import atexit
import logging
import shutil
import sys
import textwrap
from collections import Counter

from wardround.printable import printable

# Texts that are counted; a process that says more different things than these says them as often as they come.
_MOST = 1000


class _ToStderr(logging.Handler):
    """Writes to what is stderr at the moment: bars on a terminal take its place, and draw themselves below a line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text, stream = printable(self.format(record)), sys.stderr
            if stream.isatty() and record.exc_info is None:
                width = shutil.get_terminal_size().columns
                text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
            stream.write(text + "\n")
            stream.flush()
        except Exception:
            self.handleError(record)


def log_to_stderr(level: int) -> None:
    """Log what Wardround says from `level` on; of libraries errors alone, for their warnings quote files and headers.

    A text is said once, and again with its count at the 10th, 100th, ... time and when the process ends. Only
    `logging.DEBUG` shows what is for eyes at the site, each time: paths, details and tracebacks, and the warnings too.
    """
    others = logging.WARNING if level <= logging.DEBUG else logging.ERROR
    logging.basicConfig(level=others, format="%(message)s", handlers=[_ToStderr()])
    logging.captureWarnings(True)
    logging.getLogger("wardround").setLevel(level)
    if level > logging.DEBUG:
        once = Once()
        for handler in logging.getLogger().handlers:
            handler.addFilter(once)
        atexit.register(lambda: [print(line, file=sys.stderr) for line in once.counts()])


class Once(logging.Filter):
    """Lets a text through once; the same text again only at the 10th, 100th, ... time, with the count."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: Counter[str] = Counter()
        self._told: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be said; one that repeats a text gets its count."""
        text = record.getMessage()
        if text not in self._seen and len(self._seen) >= _MOST:
            return True
        self._seen[text] += 1
        count = self._seen[text]
        if count > 1 and str(count) != "1".ljust(len(str(count)), "0"):
            return False
        self._told[text] = count
        if count > 1:
            record.msg, record.args = _counted(text, count), ()
        return True

    def counts(self) -> list[str]:
        """A line for every text that came again after it was last said."""
        return [_counted(text, count) for text, count in self._seen.items() if count > self._told[text]]


def _counted(text: str, count: int) -> str:
    return f"{text} ({count} times)"

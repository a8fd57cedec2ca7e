"""What a process says on its stderr, which services and batch jobs keep for others to read."""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap


class _ToStderr(logging.Handler):
    """Writes to what is stderr at the moment: bars on a terminal take its place, and draw themselves below a line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text, stream = self.format(record), sys.stderr
            if stream.isatty() and record.exc_info is None:
                width = shutil.get_terminal_size().columns
                text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
            stream.write(text + "\n")
            stream.flush()
        except Exception:
            self.handleError(record)


def log_to_stderr(level: int) -> None:
    """Log what Wardround says from `level` on; of libraries errors alone, for their warnings quote files and headers.

    Only `logging.DEBUG` shows what is for eyes at the site: paths, details and tracebacks, and the warnings too.
    """
    others = logging.WARNING if level <= logging.DEBUG else logging.ERROR
    logging.basicConfig(level=others, format="%(message)s", handlers=[_ToStderr()])
    logging.captureWarnings(True)
    logging.getLogger("wardround").setLevel(level)

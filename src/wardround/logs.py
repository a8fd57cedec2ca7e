"""What a process says on its stderr, which services and batch jobs keep for others to read."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(level: int) -> None:
    """Log what Wardround says from `level` on; of libraries errors alone, for their warnings quote files and headers.

    Only `logging.DEBUG` shows what is for eyes at the site: paths, details and tracebacks, and the warnings too.
    """
    others = logging.WARNING if level <= logging.DEBUG else logging.ERROR
    logging.basicConfig(level=others, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    logging.getLogger("wardround").setLevel(level)

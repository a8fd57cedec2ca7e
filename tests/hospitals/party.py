"""A hospital's resident process in a toy study: it lets a study name any code, and rounds as one machine does.

No file of a site may say either, so that only tests, in Python, can.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import threading
from pathlib import Path

from tests.toys import Hold
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.site.agent import Resident
from wardround.logs import log_to_stderr
from wardround.protection.rounding import study_root
from wardround.study.schema import Study


def of_the_seed(study: Study) -> bytes:
    """The root of rounding that every site has on one machine."""
    return study_root(study.seed)


def main() -> None:
    """Be the site of a folder until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hold", default="", help="training waits while this file is there")
    parser.add_argument("--largest-file", type=int, default=0, help="no file may get longer: bytes")
    given = parser.parse_args()
    if given.hold:
        # The worker, which inherits it, trains.
        os.environ[Hold.VARIABLE] = given.hold
    if given.largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (given.largest_file, given.largest_file))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    Resident(SiteFolder(given.folder), allow_code=True, floor=1, rounding=of_the_seed).run(stop)


if __name__ == "__main__":
    log_to_stderr(logging.INFO)
    main()

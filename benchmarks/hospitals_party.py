"""The parties of hospitals.py that a person's commands do not make: a study may name this benchmark's own code.

python benchmarks/hospitals_party.py site FOLDER             the site's resident process, until SIGTERM
python benchmarks/hospitals_party.py submit FOLDER STUDY     submits a study to the coordinator of a folder
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def site(folder: Path) -> None:
    """What `wardround site start` does, with a study that names code and with updates rounded as on one machine."""
    from wardround.hospitals.folders import SiteFolder
    from wardround.hospitals.site.agent import Resident
    from wardround.protection.rounding import study_root

    def rounding(study: Any) -> bytes:
        return study_root(study.seed)

    resident = Resident(SiteFolder(folder), allow_code=True, floor=1, rounding=rounding)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    resident.run(stop)


def hand_in(folder: Path, study: Path) -> None:
    """What `wardround submit` does, for a study that names code."""
    from wardround.hospitals.coordinator.submission import submit
    from wardround.hospitals.folders import CoordinatorFolder

    submit(CoordinatorFolder(folder), study, allow_code=True)


def main() -> None:
    role, *words = sys.argv[1:]
    if role == "site":
        site(Path(words[0]))
    else:
        hand_in(Path(words[0]), Path(words[1]))


if __name__ == "__main__":
    main()

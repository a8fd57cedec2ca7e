"""How long `make test` takes in a clean clone of HEAD on two cores, and what fails there.

The clone has nothing beside it and no WARDROUND_* variable is set, so there are no real images. It borrows the packages
of the Python that runs this: what pip takes is no part of `tests_seconds`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import arguments, conditions, finish, table

ROOT = Path(__file__).parents[1]
CORES = 2


def measure_tests() -> dict[str, float]:
    """Run the suite once.

    `tests_seconds` is the wall time of `make test`, `failed` how many tests failed or could not be run, `passed` and
    `skipped` how many were, and `tests_moved` how many tests only `make test-all` runs. Raises `SystemExit` where
    pytest prints no summary, with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="first-run-") as folder:
        clone = Path(folder) / "alone" / "wardround"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        (clone / ".venv").symlink_to(sys.prefix)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WARDROUND_", "MAKE", "PYTEST_"))}
        environment["PYTHONPATH"] = str(clone / "src")
        # The packages are there, whatever the file says that they were installed from.
        command = ["make", "test", f"JOBS={CORES}", "--assume-old=.venv/.installed"]
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(cores)[:CORES])
        try:
            began = time.perf_counter()
            ran = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - began
        finally:
            os.sched_setaffinity(0, cores)
        listing = [sys.executable, "-m", "pytest", "--collect-only", "-m", "slow"]
        listed = subprocess.run(listing, cwd=clone, env=environment, capture_output=True, text=True, check=True)
    counts = outcome(ran.stdout)
    if not counts.get("passed"):
        raise SystemExit(f"pytest printed no summary:\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
    return {
        "tests_seconds": seconds,
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "passed": counts["passed"],
        "skipped": counts.get("skipped", 0),
        "tests_moved": moved(listed.stdout),
    }


def outcome(printed: str) -> dict[str, int]:
    """The numbers of pytest's summary line, as {"failed": 1, "passed": 9}; nothing where there is none."""
    lines = re.findall(r"^=* ?((?:\d+ \w+, )*\d+ \w+) in [\d.]+s", printed, re.MULTILINE)
    words = re.findall(r"(\d+) (\w+)", lines[-1]) if lines else []
    return {word.removesuffix("s") if word.startswith("error") else word: int(number) for number, word in words}


def moved(printed: str) -> int:
    """How many tests a listing of those marked slow has."""
    found = re.findall(r"^(?:(\d+)/\d+|(\d+)) tests? collected", printed, re.MULTILINE)
    return int(found[-1][0] or found[-1][1]) if found else 0


if __name__ == "__main__":
    arguments(__doc__ or "").parse_args()
    said = conditions(test_cores=CORES)
    figures = measure_tests()
    table(("figure", "value"), list(figures.items()))
    finish({**figures, "conditions": said})

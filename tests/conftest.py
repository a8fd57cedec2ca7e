"""What every test shares: quiet threads, files in memory, laws' profiles, real images, runs to be killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.examples import FULL
from tests.faults.victims import ForkServer
from tests.real_images import lacking

if TYPE_CHECKING:
    from tests.faults.killed import Undisturbed

# Before torch is imported, here and in every process that a test starts: as many workers as cores run at once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
# What tests write lies in memory where there is room: on a disk they wait a quarter of their time for `fsync`.
# Set TMPDIR to keep what a failed test wrote.
_MEMORY, _ROOM = Path("/dev/shm"), 1 << 30
if "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM:
    _FILES = tempfile.TemporaryDirectory(prefix="wardround-tests-", dir=_MEMORY)
    os.environ["TMPDIR"] = tempfile.tempdir = _FILES.name
# No test writes into the cache of the person who runs it; the folder goes when the tests end.
_CACHE = tempfile.TemporaryDirectory(prefix="wardround-cache-")
os.environ["WARDROUND_CACHE"] = _CACHE.name
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

# `make test` tries a few examples of each law, `make test-all` (`--hypothesis-profile=full`) many; see tests.examples.
settings.register_profile("quick", deadline=None, max_examples=15)
settings.register_profile("full", deadline=None, max_examples=FULL)
settings.load_profile("quick")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `data` where the real images that it reads are absent, and say so."""
    for mark in item.iter_markers("data"):
        if reason := lacking(mark.args):
            pytest.skip(reason)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts runs that can be killed; one for the whole session, for its start-up is that of torch."""
    started = ForkServer()
    yield started
    started.close()


@pytest.fixture(scope="session")
def undisturbed(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Whole runs, for runs that are killed to be compared with."""
    # Not above: it imports the package, and with it torch, before the threads are set.
    from tests.faults.killed import Undisturbed

    return Undisturbed(fork_server, tmp_path_factory.mktemp("undisturbed"))

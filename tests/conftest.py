"""What every test shares: quiet threads, worker processes that find the toys, and no deadline for slow machines."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.faults.victims import ForkServer

# Before torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test writes into the cache of whoever runs it; the folder goes when the tests end.
_CACHE = tempfile.TemporaryDirectory(prefix="wardround-cache-")
os.environ["WARDROUND_CACHE"] = _CACHE.name
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

settings.register_profile("wardround", deadline=None, max_examples=50)
settings.load_profile("wardround")


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts runs that can be killed; one for the whole session, for its start-up is that of torch."""
    started = ForkServer()
    yield started
    started.close()

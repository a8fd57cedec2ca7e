"""What a process says again and again is said once, with a count."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from wardround.logs import Once

SAYS = """
import logging, sys
from wardround.logs import log_to_stderr
log_to_stderr(getattr(logging, sys.argv[1]))
log = logging.getLogger("wardround.site")
for number in range(27):
    log.warning("site %s could not answer: %s", "B", "its data changed")
    log.debug("detail")
log.warning("another")
"""


@pytest.mark.parametrize("level", ["WARNING", "DEBUG"])
def test_a_text_is_said_once_and_counted_at_the_end(level: str) -> None:
    done = subprocess.run([sys.executable, "-c", SAYS, level], capture_output=True, text=True, check=True)
    said, text = done.stderr.splitlines(), "site B could not answer: its data changed"
    if level == "DEBUG":
        assert said.count(text) == said.count("detail") == 27
    else:
        assert said == [text, f"{text} (10 times)", "another", f"{text} (27 times)"]


def test_a_process_that_says_too_many_things_is_not_counted_without_end() -> None:
    once = Once()
    record = [logging.LogRecord("wardround", logging.WARNING, "", 0, f"{n}", (), None) for n in range(1200)]
    assert all(once.filter(r) for r in record)
    assert sum(once.filter(r) for r in record) == 200
    assert len(once.counts()) == 1000

"""A coordinator's process that kills itself, without a chance to clean up, where a test wants it to."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wardround.hospitals.coordinator.service import serve


def doom(when: str, place: str) -> None:
    """Die `before` or `after` what `module:name` or `module:class.name` does."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, name)

    def fatal(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, fatal)


if __name__ == "__main__":
    doom(*sys.argv[1:3])
    serve(Path(sys.argv[3]), say=print)

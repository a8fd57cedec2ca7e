"""The one place that decides whether this machine has the real images that some tests read.

`@pytest.mark.data("lgg", "luad-ct")` says which folders of `WARDROUND_DATA` a test reads. A variable that is not set or
empty, or a folder that is not there, means that they are absent: the test is skipped and says which of these it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = "WARDROUND_DATA"


def lacking(folders: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Why a test cannot read `folders` of the real images here; empty when it can."""
    root = environment.get(VARIABLE)
    if root is None:
        return f"{VARIABLE} is not set, so there are no real images to read"
    if not root:
        return f"{VARIABLE} is empty, so there are no real images to read"
    absent = [name for name in ("", *folders) if not (Path(root) / name).is_dir()]
    return f"{VARIABLE} names no folder of real images: {Path(root) / absent[0]} is not there" if absent else ""


def root_folder() -> Path:
    """The folder of real images. Raises `KeyError` where a test that is not marked `data` asks."""
    return Path(os.environ[VARIABLE])

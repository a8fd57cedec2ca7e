"""What a hostile study would like to have called."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def spring(file: str = "", **_: Any) -> Any:
    Path(file).touch()
    raise RuntimeError("called")

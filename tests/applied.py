"""A released model applied to one input, as `predict` does it, and what it says."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from wardround.runs.apply import Reconstructor
from wardround.runs.releases import ReleasedModel


def reconstruct(model: Path, source: Path, output: Path, *, plugins: Collection[str] = (), **options: Any) -> str:
    return Reconstructor(ReleasedModel.opened(model, plugins), **options)(source, output).said

"""Where what a study starts from may lie on one machine. It is no part of the study, of no hash and of no message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Places of the file that a study starts from and of its adapter's folder, and folders to search by content."""

    start: tuple[Path, ...] = ()
    adapter: tuple[Path, ...] = ()
    stores: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, list[str]]:
        """For another process of this machine."""
        return {name: [str(path) for path in paths] for name, paths in vars(self).items()}

    @staticmethod
    def from_json(value: Mapping[str, Sequence[str]]) -> Places:
        """What `to_json` wrote."""
        return Places(**{name: tuple(Path(path) for path in paths) for name, paths in value.items()})


NO_PLACES = Places()

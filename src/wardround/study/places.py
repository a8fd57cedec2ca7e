"""Where the files that a study names may lie on one machine. It is no part of the study, of no hash and no message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class OwnFiles(Protocol):
    """What a site says of its own copies of such files; an entry of a sites file does."""

    @property
    def start(self) -> Path | None:
        """Of the file that the study starts from."""
        ...

    @property
    def teacher(self) -> Path | None:
        """Of the released model that teaches."""
        ...

    @property
    def weights(self) -> Sequence[Path]:
        """Folders with weights."""
        ...

    @property
    def history(self) -> Path | None:
        """Where the site keeps, beside its records, the releases that reached it (`release_in`)."""
        ...


def release_in(history: Path, release: str) -> Path:
    """Where a site keeps a release (`model_sha256`) that reached it: a study that continues it needs no other copy."""
    return history / "releases" / f"{release}.safetensors"


def given(paths: Iterable[Path | None]) -> tuple[Path, ...]:
    """The paths that are any, each once."""
    return tuple(dict.fromkeys(path for path in paths if path is not None))


@dataclass(frozen=True)
class Places:
    """Places of the file that a study starts from, of its adapter's folder, of the released model that teaches and of
    Fisher information, and folders to search by content."""

    start: tuple[Path, ...] = ()
    adapter: tuple[Path, ...] = ()
    teacher: tuple[Path, ...] = ()
    fisher: tuple[Path, ...] = ()
    stores: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, list[str]]:
        """For another process of this machine."""
        return {name: [str(path) for path in paths] for name, paths in vars(self).items()}

    @staticmethod
    def from_json(value: Mapping[str, Sequence[str]]) -> Places:
        """What `to_json` wrote."""
        return Places(**{name: tuple(Path(path) for path in paths) for name, paths in value.items()})


NO_PLACES = Places()

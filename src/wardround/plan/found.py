"""Weights found by what they hold: in a machine's own folders, and in the cache of the Hugging Face hub. Local alone.

The hub's cache keeps a large file under its sha256, with a link to it in the snapshot of a repository
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Nothing is asked of the hub.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

#: Folders that are searched, with what separates paths on the machine between them.
VARIABLE = "WARDROUND_WEIGHTS"
_SUFFIX = ".safetensors"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes; raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def by_content(sha256: str, name: str, stores: Sequence[Path]) -> Path | None:
    """A .safetensors file with a hash, in `stores`, in the folders of `WARDROUND_WEIGHTS` or in the hub's cache.

    In folders, with all below them, files called `name` or by the hash come first, so that others are rarely read. A
    gigabyte takes about a second, which no list of hashes would be worth keeping right for.
    """
    if not sha256:
        return None
    for folder in searched(stores):
        for path in sorted(_files(folder), key=lambda p: (sha256 not in p.name, p.name != name, p)):
            with suppress(OSError):
                if file_sha256(path) == sha256:
                    return path
    return next((path for path in _in_hub(hub_cache()) if path.resolve().name == sha256), None)


def searched(stores: Iterable[Path]) -> tuple[Path, ...]:
    """The folders that are searched."""
    given = (Path(part).expanduser() for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part)
    return tuple(dict.fromkeys((*stores, *given)))


def hub_cache() -> Path:
    """Where the hub's own library keeps repositories, by the same variables."""
    if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser() / "hub"


def _files(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in folder.rglob(f"*{_SUFFIX}") if path.is_file())


def _in_hub(cache: Path) -> Iterator[Path]:
    with suppress(OSError, RuntimeError):
        yield from (path for path in sorted(cache.glob(f"models--*/snapshots/*/**/*{_SUFFIX}")) if path.is_file())

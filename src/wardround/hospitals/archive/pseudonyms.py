"""The key and the table of a site's pseudonyms: in a folder of their own that only the site's user may read."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wardround.errors import DataError
from wardround.wire.files import reason

KEY, TABLE = "pseudonyms.key", "pseudonyms.csv"
_COLUMNS = ("pseudonym", "PatientID", "IssuerOfPatientID", "StudyInstanceUID")


@dataclass(frozen=True)
class Pseudonyms:
    """The folder of the key and the table; both leave it in no message."""

    folder: Path

    def key(self, *, has_images: bool) -> bytes:
        """The key, made where there is none yet.

        Raises DataError where it cannot be read, or is gone while there are images named with it.
        """
        path = self.folder / KEY
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
            if not path.exists():
                if has_images:
                    raise DataError(
                        "the key of the pseudonyms is gone, and the folder holds patients named with it: restore it, "
                        "or name another `archive.folder` and fetch all of them again",
                        detail=str(path),
                    )
                _create(path, f"{secrets.token_hex(32)}\n")
            value = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except OSError as error:
            raise DataError(f"the key of the pseudonyms cannot be read ({reason(error)})", detail=str(path)) from error
        except ValueError:
            value = b""
        if len(value) != 32:
            raise DataError("the key of the pseudonyms is damaged; restore it", detail=str(path))
        return value

    def note(self, pseudonym: str, patient: str, issuer: str, study: str) -> None:
        """Put on record whose a pseudonym is, once. Raises DataError where the disk refuses."""
        path = self.folder / TABLE
        try:
            if not path.exists():
                _create(path, _line(_COLUMNS))
            with path.open("r+", encoding="utf-8", newline="") as file:
                text = file.read()
                # A line that a power cut broke off is written again, whole.
                whole = text[: text.rfind("\n") + 1]
                if any(row[:1] == [pseudonym] for row in csv.reader(io.StringIO(whole))):
                    return
                file.seek(len(whole.encode("utf-8")))
                file.truncate()
                file.write(_line((pseudonym, patient, issuer, study)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(
                f"the table of the pseudonyms cannot be written ({reason(error)})", detail=str(path)
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One fetch at a time. Raises DataError while another one is at work."""
        path = self.folder / "lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield
        except BlockingIOError:
            raise DataError("another `wardround site fetch` is at work for this site; wait for it") from None


def _create(path: Path, text: str) -> None:
    """Write a new file that only this user may read, whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def _line(cells: tuple[str, ...]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(" ".join(cell.split()) for cell in cells)
    return text.getvalue()

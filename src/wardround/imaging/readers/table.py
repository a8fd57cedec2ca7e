"""The rows of a CSV that lies beside a site's images: one way to read them, one error for what is wrong with it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from wardround.errors import DataError
from wardround.wire.files import reason

_MOST_ROWS = 1_000_000


def table_rows(path: Path, columns: Sequence[str], where: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The number of each line after the first, and what its cells in `columns` hold, without space around it.

    `where` begins a message. Raises DataError where the file cannot be read, lacks a column or has too many rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or ()
            for column in columns:
                if column not in names:
                    # The message may leave the site, and what a clinic's table has columns of stays there.
                    raise DataError(f"{where}: there is no column {column!r}", detail=f"it has {', '.join(names)}")
            for number, row in enumerate(reader, 2):
                if number > _MOST_ROWS:
                    raise DataError(f"{where}: it has more than {_MOST_ROWS:,} rows", detail=str(path))
                yield number, {column: (row[column] or "").strip() for column in columns}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = reason(error) if isinstance(error, OSError) else "it is no CSV in UTF-8"
        raise DataError(f"{where}: cannot be read ({said})", detail=str(path)) from error

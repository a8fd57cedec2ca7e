"""`result.json` and `rounds.jsonl` on the disk: written in one form, read with one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from wardround.errors import JournalError
from wardround.results.schema import Result, RoundLine
from wardround.wire.files import write_text

RESULT_FILE, ROUNDS_FILE = "result.json", "rounds.jsonl"
_VERSION = Result.model_fields["version"].default
_AGAIN = "run the study again with the same --out, which writes the file anew from what the run's folder holds"


def write_result(out: Path, result: Result) -> Result:
    """Write `result.json`, the same bytes for the same result; returns the result with its folder."""
    write_text(out / RESULT_FILE, json.dumps(result.values, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return result.lying_in(out)


def read_result(out: str | Path) -> Result:
    """The result of a finished run.

    Raises `JournalError` where `result.json` is missing, damaged, or of another version.

    >>> read_result("out").participants
    ('Alpha', 'Beta')
    >>> read_result("elsewhere")
    Traceback (most recent call last):
    wardround.errors.JournalError: the folder holds no finished run (no result.json): finish it first
    """
    out = Path(out)
    path = out / RESULT_FILE
    if not path.is_file():
        raise JournalError(f"the folder holds no finished run (no {RESULT_FILE}): finish it first", detail=str(out))
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise JournalError(f"{RESULT_FILE} is not JSON; {_AGAIN}", detail=str(path)) from error
    if not isinstance(found, dict):
        raise JournalError(f"{RESULT_FILE} is not a JSON object; {_AGAIN}", detail=str(path))
    if found.get("version") != _VERSION:
        raise JournalError(
            f"{RESULT_FILE} is of another version of Wardround (this one reads version {_VERSION}); read it with the "
            f"one that wrote it, or {_AGAIN}",
            detail=str(path),
        )
    try:
        return Result.model_validate(found).lying_in(out)
    except ValidationError as error:
        raise JournalError(f"{RESULT_FILE} is damaged: {_first(error)}; {_AGAIN}", detail=str(path)) from error


def line_of(report: object) -> str:
    """A line of `rounds.jsonl`, of any object with the attributes of `RoundLine`."""
    line = RoundLine.model_validate(report, from_attributes=True)
    return json.dumps(line.model_dump(mode="json"), allow_nan=False) + "\n"


def read_rounds(out: Path) -> tuple[RoundLine, ...]:
    """The lines of `rounds.jsonl`; none where there is no file.

    Half a last line, as a power cut leaves it, is left out. Raises `JournalError` for any other line that is no round.
    """
    path = out / ROUNDS_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    rounds = []
    for number, line in enumerate(lines, start=1):
        try:
            rounds.append(RoundLine.model_validate_json(line))
        except ValidationError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise JournalError(f"line {number} of {ROUNDS_FILE} is no round ({_first(error)}); {_AGAIN}") from error
    return tuple(rounds)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, by its key, without what stands there."""
    (first, *_) = error.errors(include_url=False, include_input=False)
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])

"""What a study is known by: the hash of what its file says, and the hash of what it comes to with all defaults.

`study_sha256` names the study that people wrote, agreed on and approved: a later version with one more setting gives
the same hash. `plan_sha256` names what is computed: it changes where a version fills in other defaults. A run is
resumed, and a site takes part, only where both are equal.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from wardround.errors import StudyError
from wardround.study.base import Settings
from wardround.study.registry import BUILTIN, Section, implied_kind
from wardround.study.schema import Study
from wardround.wire.canonical import canonical_json

# Keys that an error lists.
_SHOWN = 5


def study_sha256(study: Study) -> str:
    """The sha256 (hex) of what the study's file and its overrides say, in one way to say it.

    The order of keys, 1 or 1.0, lists or tuples, a section that is empty or absent do not matter; a scanner's preset
    counts as its numbers. A default that is written out does: the file then says more. Raises `StudyError` for an
    option that JSON cannot hold.
    """
    return _sha256(_one_number(_stated(study, study.model_dump())))


def plan_sha256(study: Study) -> str:
    """The sha256 (hex) of the canonical JSON of the study with all defaults filled in; raises as `study_sha256`."""
    return _sha256(study.model_dump())


def written(study: Study) -> dict[str, Any]:
    """What the study's file and its overrides say, as JSON values: read again, a study with the same two hashes."""
    return _stated(study, study.model_dump(mode="json"))


def differing(before: Any, now: Any) -> str:
    """The keys in which two resolved studies differ, with both values, for an error."""
    found = list(_differing("", before, now))
    return "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _differing(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*before, *now)):
            below = f"{key}.{name}" if key else str(name)
            if name not in before:
                yield f"{below} is new"
            elif name not in now:
                yield f"{below} is gone"
            else:
                yield from _differing(below, before[name], now[name])
    elif before != now:
        yield f"{key} was {before} and is {now}"


def _sha256(value: Any) -> str:
    try:
        return hashlib.sha256(canonical_json(value)).hexdigest()
    except (TypeError, ValueError) as error:
        raise StudyError(
            "the study has an option that JSON cannot hold; use numbers, text, lists and mappings",
            detail=str(error),
        ) from error


def _stated(part: BaseModel, dumped: Mapping[str, Any], *, implied: bool = True) -> dict[str, Any]:
    """Of what a section was dumped to, what was given. Its `kind`, too, where it is not `implied` by the place."""
    fields = type(part).model_fields
    found: dict[str, Any] = {}
    for name, value in dumped.items():
        if name not in part.model_fields_set and (name != "kind" or implied):
            continue
        given, field = getattr(part, name), fields.get(name)
        below = _value(given, value, implied=_implied(name, field, given, part))
        # An empty section says what an absent one says, unless an absent one is switched off.
        if below == {} and isinstance(given, BaseModel) and field is not None and field.default is not None:
            continue
        found[name] = below
    return found


def _value(given: Any, dumped: Any, *, implied: bool = False) -> Any:
    if isinstance(given, BaseModel):
        return _stated(given, dumped, implied=implied)
    if isinstance(given, Mapping):
        return (
            {key: _value(given[key], value) for key, value in dumped.items()}
            if given.keys() == dumped.keys()
            else dumped
        )
    if isinstance(given, list | tuple):
        return [_value(one, value) for one, value in zip(given, dumped, strict=True)]
    return dumped


def _implied(name: str, field: FieldInfo | None, given: Any, part: BaseModel) -> bool:
    """Whether a section without a `kind` at this place is read as what is there."""
    if isinstance(given, Settings):
        return name in BUILTIN and given.kind == implied_kind(cast(Section, name), getattr(part, "task", None))
    return field is None or type(given) is next(_models(field.annotation), None)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation allows, in its order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def _one_number(value: Any) -> Any:
    """The same with every whole number as an int: a file may say 1 or 1.0."""
    if isinstance(value, Mapping):
        return {key: _one_number(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_one_number(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

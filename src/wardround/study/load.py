"""From a YAML file to a validated study, with errors that name the key and the fix."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from wardround.errors import StudyError
from wardround.study.hashes import plan_sha256 as plan_sha256
from wardround.study.hashes import study_sha256 as study_sha256
from wardround.study.hashes import written as written
from wardround.study.registry import BASES, BUILTIN, STRICT, Reading, Section, implied_kind, settings_of
from wardround.study.schema import Study, StudySite
from wardround.study.yaml_text import parse_yaml
from wardround.study.yaml_text import read_yaml as read_yaml
from wardround.wire.canonical import MAX_DEPTH

_Model = TypeVar("_Model", bound=BaseModel)
# A study that came with a model: its plug-ins may not be installed here.
FOREIGN = Reading(foreign=True)
# A study of which no model and no method is made: results are read without torch, and without plug-ins.
UNREAD = Reading(foreign=True, unread=frozenset({"model", "method"}))
# Problems that an error lists: a file from elsewhere can have any number.
_SHOWN = 50


def load_study(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    reading: Reading = STRICT,
    near: str | Path | None = None,
) -> Study:
    """Read, override and validate a study; `reading` says what becomes of the sections of plug-ins.

    `source` is the path of a YAML file or its content as a mapping. Every override is `a.b.c=value`, the
    value in YAML; overrides come before validation, hence before hashing. `task`, `model` and `method`
    without a `kind` are of the default kind. Files that a section names are read below `near`, by default the folder of
    the YAML file. Raises StudyError, which lists every offending key.

    >>> study = load_study({"name": "mine", "sites": {"CS": {}, "EZ": {"role": "unseen"}}}, ["schedule.rounds=5"])
    >>> study.schedule.rounds
    5
    >>> study.training_sites, study.unseen_sites
    (('CS',), ('EZ',))
    >>> load_study({"name": "mine", "sites": {"CS": {}}, "round": 5})
    Traceback (most recent call last):
    wardround.errors.StudyError: ...
    """
    data = _copy(source) if isinstance(source, Mapping) else read_yaml(source, "study")
    for override in overrides:
        _apply_override(data, override)
    if near is None and not isinstance(source, Mapping):
        near = Path(source).parent
    return validate(Study, data, "study", context=replace(reading, near=None if near is None else Path(near)))


def _copy(value: Any, depth: int = 0) -> Any:
    """Copy nested mappings and sequences so that overrides never touch the caller's."""
    if isinstance(value, Study):
        return written(value)
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if depth > MAX_DEPTH:
        raise StudyError(f"the study is nested deeper than {MAX_DEPTH} levels; no study needs as many")
    if isinstance(value, Mapping):
        return {key: _copy(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item, depth + 1) for item in value]
    return value


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise StudyError(f"override {override!r} is not of the form a.b.c=value")
    if keys[0] == "sites" and len(keys) > 1 and keys[1] not in (data.get("sites") or {}):
        known = list(data.get("sites") or {})
        raise StudyError(f"override {path.strip()}: the study has no site {keys[1]!r}{_suggest(keys[1], known)}")
    place = data
    for depth, key in enumerate(keys[:-1]):
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            above = ".".join(keys[: depth + 1])
            raise StudyError(f"override {path.strip()}: `{above}` has no keys below it; set it as a whole")
    place[keys[-1]] = parse_yaml(text, f"value of override {path.strip()}")


def validate(
    model: type[_Model], data: dict[str, Any], what: str, *, show_values: bool = True, context: Reading | None = None
) -> _Model:
    """Validate `data` or raise one StudyError with a line for each offending key.

    `show_values=False` keeps what was given (paths, say) out of the message.
    """
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=True)
    lines = [_explain(model, data, item, show_values, context or STRICT) for item in found[:_SHOWN]]
    lines += [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
    raise StudyError(f"the {what} file has {count}:\n" + "\n".join(f"  - {line}" for line in lines))


def _explain(
    model: type[BaseModel], data: dict[str, Any], error: ErrorDetails, show_value: bool, reading: Reading
) -> str:
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    key = ".".join(str(part) for part in _key_path(data, location, kind)) or "study"
    given = f", not {error['input']!r}" if show_value and not isinstance(error["input"], dict | list) else ""
    if kind == "extra_forbidden":
        known = _known_keys(model, data, location[:-1], reading)
        return f"{key}: unknown key{_suggest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{key}: is missing; add it"
    if kind == "unknown_kind":
        close = _suggest(context["tag"], context["known"])
        if "did you mean" not in close:
            close += "; for a plug-in's, install its package and add its name to sites.NAME.plugins in the sites file"
        return f"{key}.kind: unknown kind {context['tag']!r}{close}"
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", str(context["expected_tags"]))
        return f"{key}.kind: unknown kind {context['tag']!r}{_suggest(str(context['tag']), tags)}"
    if kind == "union_tag_not_found":
        return f"{key}.kind: is missing; add `kind: ...`"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        close = _suggest(str(error["input"]), choices, listed=False)
        return f"{key}: must be {context['expected']}{given}{close}"
    if kind == "string_pattern_mismatch":
        return f"{key}: must match {context['pattern']}{given}"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    message = error["msg"].replace("Input should", "must")
    return f"{key}: {message[0].lower()}{message[1:]}{given}"


def _key_path(data: Any, location: Iterable[int | str], kind: str) -> list[int | str]:
    """Drop from pydantic's location what is not in the file: tags of unions, `[key]`."""
    parts = list(location)
    path: list[int | str] = []
    for position, part in enumerate(parts):
        missing = kind == "missing" and position == len(parts) - 1
        inside_mapping = isinstance(data, dict) and part in data
        if inside_mapping or (isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)):
            data = data[part]
        elif not missing:
            continue
        path.append(part)
    return path


def _known_keys(
    model: type[BaseModel], data: Mapping[str, Any], location: Iterable[int | str], reading: Reading
) -> list[str]:
    """Names of the keys allowed at a location of `model`."""
    candidates: list[Any] = [model]
    given: Any = data
    for part in location:
        below: list[Any] = []
        given = given[part] if isinstance(given, Mapping) and part in given else given
        for candidate in candidates:
            if get_origin(candidate) is dict:
                below += _alternatives(get_args(candidate)[1])
            elif get_origin(candidate) is tuple:
                below += _alternatives(get_args(candidate)[0])
            elif candidate in (Study, StudySite) and part in BUILTIN:
                section = cast(Section, part)
                settings = settings_of(section, given.get("kind", implied_kind(section, None, given)), reading)
                below += [] if settings is None else [settings]
            elif isinstance(candidate, type) and issubclass(candidate, BaseModel):
                if part in candidate.model_fields:
                    hint = typing.get_type_hints(candidate, include_extras=True)[str(part)]
                    below += [_of_kind(found, given, reading) for found in _alternatives(hint)]
                elif part in _kinds(candidate):
                    below.append(candidate)
        candidates = below
    models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return sorted({name for candidate in models for name in candidate.model_fields})


def _of_kind(settings: Any, given: Any, reading: Reading) -> Any:
    """The settings of the kind that is given, where those of any kind of a section may stand."""
    section = next((section for section, base in BASES.items() if settings is base), None)
    kind = given.get("kind") if isinstance(given, Mapping) else None
    found = settings_of(section, kind, reading) if section is not None and isinstance(kind, str) else None
    return settings if found is None else found


def _alternatives(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [found for part in get_args(annotation) for found in _alternatives(part)]
    return [annotation]


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _suggest(word: str, known: Sequence[str], *, listed: bool = True) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known are {', '.join(f'`{name}`' for name in known)}" if listed and known else ""

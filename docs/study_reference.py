"""Writes docs/study.md from the schema, so that the page cannot lag behind the code: python docs/study_reference.py"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from wardround.study.schema import Study
from wardround.study.sites import SitesFile

PAGE = Path(__file__).parent / "study.md"
INTRO = """# The study file

A study is one YAML file that holds everything that decides the result. Unknown keys are refused; errors name the key
and the fix. `--set a.b=value` overrides a key before the study is hashed; `wardround check STUDY --full` prints every
default. Where a site's data lie is never in it: the [sites file](#sitesfile) says that.

A file (study, sites, `--set`) of more than 2^20 bytes, 32,000 values (aliases written out) or 16 levels is refused with
the place, whatever it stands for. Code that a study names is called where the site's file [allows
it](data.md#plug-ins).

This page is generated from the schema (`docs/study_reference.py`).
"""


def page() -> str:
    """The page as Markdown."""
    seen: list[type[BaseModel]] = []
    _collect(Study, seen)
    _collect(SitesFile, seen)
    return INTRO + "".join(_section(model) for model in seen)


def _collect(model: type[BaseModel], seen: list[type[BaseModel]]) -> None:
    if model in seen:
        return
    seen.append(model)
    for field in model.model_fields.values():
        for part in _models(field.annotation):
            _collect(part, seen)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _section(model: type[BaseModel]) -> str:
    text = " ".join((model.__doc__ or "").split())
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_limits(field)} |"
        for name, field in model.model_fields.items()
    ]
    header = "| key | type | default | |\n|---|---|---|---|\n"
    return f"\n## {model.__name__}\n\n{text}\n\n{header}" + "\n".join(rows) + "\n"


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in parts if part is not type(None))
    if origin is dict:
        return f"{_type(parts[1])} by name"
    if origin is tuple:
        return f"list of {_type(parts[0])}"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}.get(
        annotation, getattr(annotation, "__name__", "anything")
    )


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        changes = _changes(value)
        return f"its defaults, with {', '.join(changes)}" if changes else "its defaults"
    return _value(value)


def _changes(value: BaseModel) -> list[str]:
    """Where a default differs from what its own section states."""
    defaults = {name: field.get_default(call_default_factory=True) for name, field in type(value).model_fields.items()}
    return [f"`{name}`: {_value(own)}" for name, own in value if own != defaults[name]]


def _value(value: Any) -> str:
    if value is None or value in ("", {}):
        return "-"
    return f"`{list(value) if isinstance(value, tuple) else value}`".replace("True", "true").replace("False", "false")


def _limits(field: FieldInfo) -> str:
    symbols = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{symbol} {getattr(item, name)}"
        for item in field.metadata
        for name, symbol in symbols.items()
        if getattr(item, name, None) is not None
    ]
    return "; ".join(part for part in (field.description or "", ", ".join(limits)) if part)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Writes study.md and results.md from the schemas, and api.md from docstrings: python docs/reference.py

So no page can lag behind the code.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from wardround.results.schema import Result, RoundLine
from wardround.study.registry import BASES, builtins
from wardround.study.schema import Study
from wardround.study.sites import SitesFile

# Sections whose kinds the registry lists.
_OPEN = {base: section for section, base in BASES.items()}
DOCS = Path(__file__).parent
STUDY = """# The study file

A study is one YAML file that holds everything that decides the result. Unknown keys are refused; errors name the key
and the fix. `--set a.b=value` overrides a key before the study is hashed; `wardround check STUDY --full` prints every
default. Where a site's data lie and how its machine computes is never in it: the [sites file](#sitesfile) says that.

A study is known by two hashes. `study_sha256` is over what the file and the overrides say: the order of keys, 1 or
1.0, an empty or an absent section make no difference, a default that is written out does, and a later version with one
more setting gives the same hash. `plan_sha256` is over the study with every default filled in. A run is resumed, a site
takes part and a model is evaluated only where both are equal; where the second alone differs, the error says that
another version fills in other defaults.

A file (study, sites, `--set`) of more than 2^20 bytes, 32,000 values (aliases written out) or 16 levels is refused with
the place, whatever it stands for. Code that a study names is called where the site's file [allows
it](data.md#plug-ins).

This page is generated from the schema (`docs/reference.py`).
"""
RESULTS = """# The result files

`wardround run` writes `result.json` and `rounds.jsonl` (a line for each committed round of every arm). Other programs
may read them: names stay, and a changed or removed one takes another `version`. A file of another version, or with an
unknown key, is refused with one error; running the study again with the same `--out` writes it anew.

From Python the same is read as frozen values, with the names below as attributes:

```python
from pathlib import Path
from wardround.results.files import read_result, read_rounds

result = read_result(Path("out"))  # what wardround.run returned
result.metrics["federated"]["mean"]["psnr"].value
result.metric("federated", "mean", "psnr")  # the same; a KeyError where it was not measured
result.privacy.epsilon if result.privacy else None
[line.loss for line in read_rounds(Path("out")) if line.arm == "federated"]
```

`wardround.evaluate` returns the part of it that is measured again (the keys `metric_specs`,
`metrics`, `baselines`, `gains`, `left_out`, `elsewhere`, `withheld`, `failed`, `parts`, `groups`, `groups_missing`).

For a spreadsheet, `wardround inspect OUT --csv numbers.csv` writes a row for every number: arm, site (or `mean`,
`unseen`), metric, value, se, ci_low, ci_high, n, absent. Numbers that are withheld have no row, and `baseline`, which
holds the first baseline once more, has none either. A site's own model at another site is the arm `local/SITE`. Where
there are results by group, rows of them follow, with `column` and `group` at their end.

Numbers are finite; values, standard errors and intervals are rounded to 6 decimals. Where a site's numbers are `null`,
`withheld` or `failed` says why ([the report](report.md#numbers-that-are-not-there)).

A run of a study with `schedule.rounds: 0` [trained nothing](data.md#where-nothing-is-trained). It has the same keys:
the arm `federated` is the model that `start` names, `rounds`, `steps`, `examples`, `selected_round` and the traffic of
rounds are 0, `participants` is empty, and `rounds.jsonl` has no line. `mean` is over all sites with patients of their
own. `model_sha256` covers the model's shared values as ever: of a release it is that of the run that made it, where
both studies freeze the same `parts`.

This page is generated from the schema (`docs/reference.py`).
"""
API = """# Python API

What a program outside may rely on: `import wardround` and the classes that a task, method, operator or watcher of your
own is made of. Everything else may change without notice. Short programs that run as they are stand in `examples/`:
`own_task.py`, `own_method.py`, `own_operator.py`. The keys of a study are on [its page](study.md), the attributes of a
result on [theirs](results.md). The `>>>` lines below run in the tests, beside the files of two small hospitals.

This page is generated from the docstrings (`docs/reference.py`).
"""
# By section of the page: `module:name`.
PUBLIC = {
    "Studies": (
        "wardround:run",
        "wardround:evaluate",
        "wardround:join",
        "wardround:update",
        "wardround:predict",
        "wardround:reconstruct",
        "wardround:load_study",
        "wardround:load_sites",
    ),
    "Results": (
        "wardround:Result",
        "wardround.results.schema:Measured",
        "wardround.results.schema:Estimate",
        "wardround.results.files:read_result",
        "wardround.results.files:read_rounds",
        "wardround.runs.predict:Predictions",
        "wardround.runs.predict_images:Outline",
        "wardround.runs.predict_images:Structure",
        "wardround.runs.predict_images:Diagnosis",
        "wardround.tasks.predictions:Probabilities",
        "wardround.runs.predict_images:Failure",
        "wardround.runs.apply:Reconstruction",
    ),
    "A run as it goes on": ("wardround.runs.watching:Watcher",),
    "Your own task": (
        "wardround.tasks.task:Task",
        "wardround.tasks.task:Dataset",
        "wardround.tasks.task:MetricSpec",
        "wardround.tasks.task:Imaging",
        "wardround.tasks.task:Reporting",
        "wardround.tasks.task:ReportPart",
        "wardround.tasks.task:Predicts",
        "wardround.tasks.predictions:Masks",
    ),
    "Your own method": ("wardround.learning.methods.method:Method", "wardround.learning.methods.method:LocalRound"),
    "Your own operator": (
        "wardround.imaging.acquisition.operator:LinearOperator",
        "wardround.study.acquisitions:AcquisitionSettings",
        "wardround.study.baselines:Baseline",
    ),
    "Errors": (
        "wardround:WardroundError",
        "wardround.errors:StudyError",
        "wardround.errors:DataError",
        "wardround.errors:JournalError",
        "wardround.errors:NotEnoughSites",
        "wardround.errors:Interrupted",
        "wardround.errors:MissingExtra",
    ),
}


def pages() -> dict[str, str]:
    """The pages as Markdown, by name."""
    schemas = "".join(
        f"\n## JSON schema of {name}\n\n```json\n{json.dumps(model.model_json_schema(), indent=2)}\n```\n"
        for name, model in (("result.json", Result), ("a line of rounds.jsonl", RoundLine))
    )
    return {
        "study.md": STUDY + _sections(Study, SitesFile),
        "api.md": API + "".join(f"\n## {title}\n" + "".join(map(_entry, places)) for title, places in PUBLIC.items()),
        "results.md": RESULTS + _sections(Result, RoundLine) + schemas,
    }


def _entry(place: str) -> str:
    """A public function, or a class with what it defines itself."""
    module, _, name = place.partition(":")
    found = getattr(importlib.import_module(module), name)
    text = f"\n### {module}.{name}\n\n"
    plain = inspect.isfunction(found) or (dataclasses.is_dataclass(found) and not issubclass(found, BaseModel))
    text += f"```python\n{name}{_signature(found)}\n```\n\n" if plain else ""
    text += _documented(found)
    for member, value in vars(found).items() if inspect.isclass(found) else ():
        if member.startswith("_") or member == "model_config":
            continue
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function):
            text += f"\n**`{member}{'' if isinstance(value, property) else _signature(function, wide=True)}`**\n\n"
            text += _documented(function)
    return text


def _signature(found: Any, *, wide: bool = False) -> str:
    """As in the source; a parameter a line where all do not fit into one."""
    parts, starred = [], False
    signature = inspect.signature(found)
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        kind = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {_shown(parameter.default)}"
        parts.append(f"{parameter.name}{kind}{default}")
    returned = "" if inspect.isclass(found) else signature.return_annotation
    end = "" if returned in ("", signature.empty) else f" -> {_annotation(returned)}"
    line = f"({', '.join(parts)}){end}"
    return line if wide or len(line) <= 100 else "(\n    " + ",\n    ".join(parts) + f",\n){end}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _shown(default: Any) -> str:
    """A default as in the source; a function, or one that a factory makes, as dots."""
    text = repr(default)
    return "..." if text.startswith("<") else text


def _documented(found: Any) -> str:
    """A docstring as Markdown: what is typed at `>>>`, and what it prints, becomes a block."""
    paragraphs = (inspect.getdoc(found) or "").split("\n\n")
    blocks = (f"```pycon\n{one}\n```" if one.startswith(">>>") else re.sub(r"\n +", "\n", one) for one in paragraphs)
    return "\n\n".join(blocks) + "\n"


def _sections(*models: type[BaseModel]) -> str:
    seen: list[type[BaseModel]] = []
    for model in models:
        _collect(model, seen)
    return "".join(_section(model) for model in seen)


def _collect(model: type[BaseModel], seen: list[type[BaseModel]]) -> None:
    if model in seen:
        return
    seen.append(model)
    for field in model.model_fields.values():
        for part in _models(field.annotation):
            _collect(part, seen)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if section := _OPEN.get(annotation):
        return list(builtins(section))
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
    return f"\n## {_name(model)}\n\n{text}\n\n{header}" + "\n".join(rows) + "\n"


def _name(model: type[BaseModel]) -> str:
    return model.__name__.removesuffix("Settings")


def _type(annotation: Any) -> str:
    if section := _OPEN.get(annotation):
        return " or ".join([*map(_type, builtins(section)), "[a plug-in's](data.md#plug-ins)"])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{_name(annotation)}](#{_name(annotation).lower()})"
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
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")

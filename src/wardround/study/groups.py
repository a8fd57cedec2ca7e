"""Columns of a site's own table by which it lets its results be told apart: sex, age band. No part of any study.

A study could choose columns, values and limits that single patients out, one study after the other. So the site writes
them, once, into its own file, and what it does not write there is never looked at.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from wardround.study.base import Config

MOST_COLUMNS, MOST_GROUPS = 4, 8
# The group of patients whose value is in no other one, or of whom the table says nothing.
OTHER = "other"
# What stands in messages, reports and files: words and numbers, no markup and no path.
Label = Annotated[str, Field(pattern=r"^[\p{L}\p{N}][\p{L}\p{M}\p{N} .+_-]{0,31}$")]
# A cell as the table has it; YAML reads some as numbers and `true`.
_Cell = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]


class Column(Config):
    """A column and its groups: by `values`, or of numbers by `bands`; whom neither names is in the group `other`."""

    column: str | None = Field(None, description="the column's name in the table; default: the one it has here")
    values: dict[Label, tuple[_Cell, ...]] | None = Field(
        None,
        max_length=MOST_GROUPS,
        description="each group with the cells that mean it: `{female: [F, w], male: [M]}`; a list `[female, male]` is "
        "short for groups that are called as their cells",
    )
    bands: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        max_length=MOST_GROUPS - 1,
        description="where one band of numbers ends and the next begins: `[40, 60]` is below 40, 40 to below 60, and "
        "60 or more",
    )

    @field_validator("values", mode="before")
    @classmethod
    def _cells_are_named_as_they_are(cls, value: Any) -> Any:
        return {str(name): (name,) for name in value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _groups_are_told_apart(self) -> Column:
        if (self.values is None) == (self.bands is None):
            raise ValueError("give `values` or `bands`, one of them")
        cells = [cell for group in (self.values or {}).values() for cell in group]
        if len(set(cells)) < len(cells):
            raise ValueError("`values`: a cell that means two groups; let it mean one")
        if OTHER in (self.values or {}):
            raise ValueError(f"`values`: {OTHER!r} is the group of all who are in no other; call the group otherwise")
        if any(low >= high for low, high in pairwise(self.bands or ())):
            raise ValueError("`bands`: each number must be larger than the one before")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """The groups in order, without `other`."""
        if self.values is not None:
            return tuple(self.values)
        ends = [f"{end:g}" for end in self.bands or ()]
        between = (f"{low} to below {high}" for low, high in pairwise(ends))
        return (f"below {ends[0]}", *between, f"{ends[-1]} or more")

    def label(self, cell: str) -> str:
        """The group of a cell of the table."""
        if self.values is not None:
            return next((name for name, cells in self.values.items() if cell in cells), OTHER)
        try:
            number = float(cell)
        except ValueError:
            return OTHER
        # What is no number is below none.
        return OTHER if number != number else self.labels[sum(number >= end for end in self.bands or ())]


class Groups(Config):
    """The table of a site's patients, and the columns by which its results are given in groups."""

    file: Path = Field(description="a CSV, relative to the sites file; several rows of a patient must agree")
    patient: str = Field("patient", description="the column that names the patient, as the patient's folder is called")
    columns: dict[Label, Column] = Field(
        min_length=1,
        max_length=MOST_COLUMNS,
        description="by the name that leaves the site; a later one is left out where it crosses an earlier one in few "
        "patients",
    )

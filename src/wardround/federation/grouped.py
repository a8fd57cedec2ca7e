"""What a site says of its results by a column of its own table: the question, and the schema of the answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wardround.federation.facts import Count
from wardround.study.base import Config
from wardround.study.groups import MOST_COLUMNS, MOST_GROUPS, Label

# The kind of the question and of its answer.
GROUPS = "groups"
# An answer comes from outside: no more names than a study could have arms, and a task metrics.
_Name = Annotated[str, Field(max_length=200)]


class GroupValue(Config):
    """A metric over `n` patients of a group, in whole steps; `absent` others of the group have no value."""

    n: Count = Field(ge=1)
    value: float
    se: float | None = Field(None, ge=0.0)
    absent: Count = 0


class SiteGroup(Config):
    """The patients of one value of a column: by row (an arm or a baseline) and metric."""

    name: Label
    rows: dict[_Name, dict[_Name, GroupValue]]


class SiteColumn(Config):
    """A column at a site: all of its groups, or why none."""

    name: Label
    groups: tuple[SiteGroup, ...] = Field((), max_length=MOST_GROUPS + 1)
    reason: str = Field("", max_length=400, description="why its groups stay at the site; empty where they do not")


class SiteGroups(Config):
    """The columns that a site's own file declares, in its order; none for a site that declares none."""

    columns: tuple[SiteColumn, ...] = Field((), max_length=MOST_COLUMNS)

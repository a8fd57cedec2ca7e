"""What a site says of its images before training: the question, the schema of the answer, and how answers add up.

All of it is sums over patients in whole numbers, so those of several sites add up exactly in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from wardround.errors import WireError
from wardround.federation.facts import Count
from wardround.study.base import Config
from wardround.tasks.looks import Subject
from wardround.tasks.task import Split

# The kind of the question and of its answer.
STATISTICS = "statistics"
# What the classes of a handful of patients are counted as.
OTHER = "small classes"
CLASSES = "classes"
_LARGEST = 1 << 62
_Name = Annotated[str, Field(max_length=200)]
_Whole = Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)]
_Reason = Annotated[str, Field(max_length=400)]


class Sums(Config):
    """Sums over the `n` patients that have a value, in whole steps of the quantity; of squares where it has them."""

    n: Count = Field(ge=1)
    total: tuple[_Whole, ...] = Field(max_length=1 << 16)
    squares: tuple[Annotated[int, Field(ge=0, le=_LARGEST)], ...] = Field((), max_length=1 << 16)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            n=self.n + other.n,
            total=tuple(a + b for a, b in zip(self.total, other.total, strict=True)),
            squares=tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
        )


class SiteStatistics(Config):
    """A site's sums, over the training patients or, where it has none, those who validate or test.

    `patients` is `None` where nothing leaves. `classes`: how many patients have each class; where each patient has one,
    those of a handful of patients are together in `small classes`.
    """

    version: Literal[1] = 1
    split: Split | None = None
    patients: Count | None = None
    quantities: dict[_Name, Sums] = Field({}, max_length=1000)
    classes: dict[_Name, Count] = Field({}, max_length=1000)
    withheld: dict[_Name, _Reason] = Field({}, max_length=1000, description="by quantity: why it stays at the site")


def check_statistics(said: SiteStatistics, subject: Subject) -> SiteStatistics:
    """The same; raises `WireError` for a quantity or class that the study does not have, or one of another size."""
    known = subject.quantities
    for name, sums in said.quantities.items():
        quantity = known.get(name)
        if quantity is None or len(sums.total) != quantity.size or sums.n > (said.patients or 0):
            raise WireError("statistics of something that the study does not have, or of another size")
        if len(sums.squares) != (quantity.size if quantity.squares else 0):
            raise WireError("statistics with squares that the study does not ask for, or without")
    if said.classes.keys() - {*subject.classes, OTHER}:
        raise WireError("statistics of a class that the study does not have")
    return said


def added(sites: Mapping[str, SiteStatistics], name: str) -> Sums | None:
    """A quantity over the patients of all sites that give it; `None` where none does."""
    found = [site.quantities[name] for site in sites.values() if name in site.quantities]
    whole = found[0] if found else None
    for each in found[1:]:
        whole = each if whole is None else whole + each
    return whole

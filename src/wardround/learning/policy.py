"""Who owns what: every parameter and buffer of a model is shared, local or frozen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from wardround.study.patterns import matched
from wardround.wire.tensors import TensorInfo

Role = Literal["shared", "local", "frozen"]
# Names that an error lists.
_LISTED = 5


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer as a policy sees it; `layer` is the class name of the module that owns it.

    `head`: the model's settings count it to the head, which says what the features of the body mean.
    """

    info: TensorInfo
    trainable: bool
    buffer: bool
    layer: str
    head: bool = False

    @property
    def name(self) -> str:
        """The name in the model's state."""
        return self.info.name

    @property
    def is_half(self) -> bool:
        """Whether it has 16 bits, of which an average of many small changes would be lost."""
        return self.info.dtype in ("bfloat16", "float16")

    @property
    def is_float(self) -> bool:
        """Whether averaging it means anything."""
        return self.info.dtype.startswith("float")


@dataclass(frozen=True)
class Policy:
    """The role of every parameter and buffer, by name."""

    roles: dict[str, Role]

    def names(self, role: Role) -> tuple[str, ...]:
        """The names with that role, in the model's order."""
        return tuple(name for name, found in self.roles.items() if found == role)

    def with_parts(self, frozen: Collection[str], local: Collection[str]) -> Policy:
        """The same with the study's own roles on top: frozen first, then local."""
        return Policy(
            {
                name: "frozen" if name in frozen else "local" if name in local else role
                for name, role in self.roles.items()
            }
        )


def matching(patterns: Sequence[str], names: Collection[str], key: str) -> frozenset[str]:
    """The names that any of the patterns of a key of the study matches; raises `StudyError` where one matches none."""
    return frozenset(
        matched(patterns, names, lambda one: f"{key}: {one!r} matches no name of the model; it has {listed(names)}")
    )


def listed(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    first = ", ".join(list(names)[:_LISTED])
    return first if len(names) <= _LISTED else f"{first} and {len(names) - _LISTED} more"

"""Who owns what: every parameter and buffer of a model is shared, local or frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wardround.wire.tensors import TensorInfo

Role = Literal["shared", "local", "frozen"]


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer as a policy sees it; `layer` is the class name of the module that owns it."""

    info: TensorInfo
    trainable: bool
    buffer: bool
    layer: str

    @property
    def name(self) -> str:
        """The name in the model's state."""
        return self.info.name

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

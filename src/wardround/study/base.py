"""The base of every part of the study file."""

from __future__ import annotations

import importlib
import typing
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

# An entry point by its name, or code by its place.
Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.-]*(:[A-Za-z_]\w*)?$")]
KindName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.-]{0,63}$")]


def at(place: str) -> Any:
    """What stands at `package.module:name`; raises `ImportError` and `AttributeError` where nothing does."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


class Config(BaseModel):
    """A frozen part of the study; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Settings(Config):
    """A section whose `kind` decides its keys: the base of every task, model and method that a study can name."""

    kind: KindName
    #: Whether these are a plug-in's, as the file has them: nothing of that package was imported.
    closed: ClassVar[bool] = False

    def describe(self) -> str:
        """What `check` prints of it, in a line."""
        return self.kind

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """The kinds that these settings are of: the values of a `kind: Literal[...]`."""
        return tuple(str(kind) for kind in typing.get_args(cls.model_fields["kind"].annotation))

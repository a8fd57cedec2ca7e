"""What a model begins with, and which of its parameters never change or never leave a site."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from wardround.study.base import Config

# Empty until it is known: the error that follows says what to write.
Hash = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
_WHERE = "where it lies below the study's folder; a site's `start` in the sites file is any other place"


def below(file: str) -> str:
    """Studies come from others: none may ask what lies elsewhere on a machine."""
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file:
        raise ValueError(
            f"{file} is no path below the study's folder; move the file there, or say where it lies with `start` in a "
            "site's entry of the sites file"
        )
    return file


Below = Annotated[str, Field(min_length=1), AfterValidator(below)]
_ONLY = (
    "patterns of the file's values that are taken, `*` stands for any text: `encoder.*` of a pretraining. All others "
    "are left out. What the model has of these names, the file must have"
)
_PARTIAL = "whether values that the file lacks begin fresh; else they are an error"


def _of(only: tuple[str, ...]) -> str:
    return f", only {', '.join(only)}" if only else ""


def _with(adapter: FromAdapter | None) -> str:
    return f", with the adapter of sha256 {adapter.sha256}" if adapter else ""


class Fresh(Config):
    """Values drawn from the study's seed, the same at every site."""

    kind: Literal["fresh"] = "fresh"

    def describe(self) -> str:
        """What `check`, the model's card and `inspect` print of it."""
        return "fresh, from the study's seed"


class FromAdapter(Config):
    """A LoRA adapter in a folder as Hugging Face's peft writes it: `adapter_model.safetensors` and its settings.

    Rank, scale and layers must be those of the study's `adapters`.
    """

    file: Below = Field(description="the folder, below the study's; a site may have it in its `weights` instead")
    sha256: Hash = Field("", description="of its adapter_model.safetensors; without it an error says what it is")


_ADAPTER = "what LoRA begins with, on this base; default: as nothing"


class FromWeights(Config):
    """A `.safetensors` file with tensors by the model's names."""

    kind: Literal["weights"]
    file: Below = Field(description=_WHERE)
    sha256: Hash = Field("", description="of the file's bytes; without it an error says what it is")
    into: str = Field(
        "",
        pattern=r"^[\w.]*$",
        description="`NAME` in the file is `INTO.NAME` in the model, whose other values begin fresh",
    )
    only: tuple[str, ...] = Field((), description=_ONLY)
    partial: bool = Field(False, description=_PARTIAL)
    adapter: FromAdapter | None = Field(None, description=_ADAPTER)

    def describe(self) -> str:
        """With the hash that the study fixes."""
        into = f", into {self.into}" if self.into else ""
        return f"weights of sha256 {self.sha256}{_of(self.only)}{into}{_with(self.adapter)}"


class FromRelease(Config):
    """The released model of another run: what its `model_sha256` covers, its shared and its frozen values."""

    kind: Literal["release"]
    file: Below = Field(description=f"the run's folder, or the model's file; {_WHERE}")
    sha256: Hash = Field("", description="`model_sha256` of that run; without it an error says what it is")
    only: tuple[str, ...] = Field((), description=_ONLY)
    partial: bool = Field(
        False,
        description="whether values that `model_sha256` does not cover (a personal part of the other run), or that "
        "`only` leaves out, begin fresh; else they are an error",
    )
    adapter: FromAdapter | None = Field(None, description=_ADAPTER)

    def describe(self) -> str:
        """With the hash that the study fixes."""
        return f"the released model {self.sha256}{_of(self.only)}{_with(self.adapter)}"


Start = Annotated[Fresh | FromWeights | FromRelease, Field(discriminator="kind")]


class Parts(Config):
    """Roles of parameters and buffers by name, in every arm, on top of the method's; `*` stands for any text."""

    frozen: tuple[str, ...] = Field(
        (),
        description="never trained and in no message: `encoder.*`. A layer that is frozen as a whole, with its "
        "buffers, stays in evaluation mode",
    )
    local: tuple[str, ...] = Field(
        (),
        description="trained and kept at each site, as a personal method keeps its part; arms of one party share it "
        "with themselves",
    )

"""What the commands share: how errors are told, the options of several, and what is printed at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from wardround.errors import Interrupted, WardroundError

if TYPE_CHECKING:
    from wardround.runner.session import Result
    from wardround.runner.watching import Watcher

console = Console()
errors = Console(stderr=True)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file (YAML).")]
SitesOption = Annotated[Path, typer.Option("--sites", help="Where each site's data lie (YAML).")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Where to write the results (default: runs/NAME).")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the study: a.b=value.")]
CompareOption = Annotated[str, typer.Option("--compare", help="What to compare with: local,pooled.")]
EngineName = Literal["local", "workers"]
EngineOption = Annotated[
    EngineName | None, typer.Option("--engine", help="One process, or several (default where there are cores).")
]
ProcessesOption = Annotated[
    int | None, typer.Option("--processes", min=1, help="Worker processes (default: one a core).")
]


class Commands(TyperGroup):
    """Every error raised on purpose, or by the disk, becomes one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 2 stands for an error, 130 for a run that was stopped."""
        try:
            return super().invoke(ctx)
        except Interrupted as error:
            errors.print(Text(str(error), style="yellow"), soft_wrap=True)
            raise typer.Exit(130) from None
        except WardroundError as error:
            explain(str(error), error.detail)
        except BrokenPipeError:
            raise
        except OSError as error:
            explain(os.strerror(error.errno) if error.errno else str(error), str(error.filename or ""))
        raise typer.Exit(2)


def words(text: str) -> list[str]:
    """The words of a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def say(text: str) -> None:
    """Print a text as it is: no colours guessed, no line broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def explain(message: str, detail: str) -> None:
    """Print an error, and below it where it is: for eyes on this machine."""
    errors.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if detail:
        errors.print(Text(f"       ({detail})", style="dim"), soft_wrap=True)


@contextmanager
def watching() -> Iterator[Watcher | None]:
    """A watcher that draws on the terminal; none where there is no terminal."""
    if not console.is_terminal:
        yield None
        return
    from wardround.progress import LiveProgress

    with LiveProgress(console) as live:
        yield live


def summary(result: Result) -> None:
    """Print a run's results and where its files are."""
    results(result.values)
    say(f"Report: {result.report}")
    say(f"Model:  {result.out / 'models' / 'federated.safetensors'}")


def results(values: Mapping[str, Any]) -> None:
    """Print the table of the results, and which sites are lacking in it and why."""
    from wardround.report.terminal import lacking_in, table_of

    table = table_of(values["metrics"])
    if table is not None:
        console.print(table)
    for line in lacking_in(values):
        say(line)

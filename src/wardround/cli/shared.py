"""What the commands share: how errors are told, the options of several, and what is printed at the end of a run."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from wardround.errors import Interrupted, WardroundError
from wardround.printable import printable

if TYPE_CHECKING:
    from wardround.results.schema import Measured, Result
    from wardround.runs.watching import Watcher

console = Console()
errors = Console(stderr=True)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file (YAML).")]
SitesOption = Annotated[Path, typer.Option("--sites", help="Where each site's data lie (YAML).")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Where to write the results (default: runs/NAME).")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the study: a.b=value.")]
CompareOption = Annotated[str, typer.Option("--compare", help="What to compare with: local,pooled.")]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="local: one process; workers: several (default where there are cores); or an installed package's.",
    ),
]
ProcessesOption = Annotated[
    int | None, typer.Option("--processes", min=1, help="Worker processes (default: one a core).")
]
AllowCodeOption = Annotated[
    bool, typer.Option("--allow-code", help="Let the study name any code, not only plug-ins of the sites file.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, only results, warnings and errors.")]

TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track", metavar="TRACKER", help="Also send rounds to tensorboard:FOLDER, mlflow or mlflow:URI; repeatable."
    ),
]


class Commands(TyperGroup):
    """Every error raised on purpose, or by the disk, becomes one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 2 stands for an error, 130 for a run that was stopped."""
        try:
            return super().invoke(ctx)
        except Interrupted as error:
            complain(str(error))
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


def say(text: str, style: str = "") -> None:
    """Print a text as it is, without colours guessed; its lines are broken between words, and only on a terminal."""
    _print(console, text, style=style)


def explain(message: str, detail: str) -> None:
    """Print an error, and below it where it is: for eyes on this machine."""
    _print(errors, f"error: {message}", first="bold red")
    if detail:
        _print(errors, f"       ({detail})", style="dim")


def complain(text: str, style: str = "yellow") -> None:
    """Print to stderr what went wrong, or what to mind."""
    _print(errors, text, style=style)


def _print(where: Console, text: str, *, style: str = "", first: str = "") -> None:
    """Print with a style, its first word with that of its own.

    A program that reads the output, and a search in a log, need whole lines; a path is never broken.
    """
    text = printable(text)
    if where.is_terminal:
        text = "\n".join(_wrapped(line, where.width) for line in text.split("\n"))
    styled = Text(text, style=style)
    if first:
        styled.stylize(first, 0, text.find(" "))
    where.print(styled, soft_wrap=True)


def _wrapped(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


@contextmanager
def watching(quiet: bool = False) -> Iterator[Watcher]:
    """A watcher: bars on a terminal, a line for each phase and round elsewhere, and nothing where it is `quiet`."""
    from wardround.runs.watching import Lines, Silent

    if quiet:
        yield Silent()
    elif not console.is_terminal:
        yield Lines()
    else:
        from wardround.progress import LiveProgress

        with LiveProgress(console) as live:
            yield live


def summary(result: Result) -> None:
    """Print a run's results, what its messages weighed, and where its files are."""
    from wardround.results.bill import bill_on_terminal

    results(result)
    if not result.rounds:
        named = "the released model" if result.start.kind == "release" else "weights of sha256"
        say(f"Nothing was trained. Measured: {named} {result.start.sha256}")
    if (bill := bill_on_terminal(result)) is not None:
        console.print(bill)
    say(f"Report: {result.report}")
    say(f"Model:  {result.out / 'models' / 'federated.safetensors'}")


def results(measured: Measured) -> None:
    """Print the table of the results, and which sites are lacking in it and why."""
    from wardround.results.terminal import gate_lines, lacking_in, tables_of

    for table in tables_of(measured, console.width):
        console.print(table)
    for line in (*lacking_in(measured), *gate_lines(measured)):
        say(line)

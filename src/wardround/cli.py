"""The commands; thin."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from wardround import __version__
from wardround.errors import Interrupted, WardroundError

if TYPE_CHECKING:
    from wardround.runner.session import Result, Watcher

app = typer.Typer(
    help="Train imaging models across hospitals without moving a scan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(help="Convert public downloads into Wardround's folder layout.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")
console = Console()
errors = Console(stderr=True)

StudyFile = Annotated[Path, typer.Argument(help="The study file (YAML).", show_default=False)]
SitesOption = Annotated[Path, typer.Option("--sites", help="Where each site's data lie (YAML).")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Where to write the results [runs/NAME].")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the study: a.b=value.")]
EngineOption = Annotated[str | None, typer.Option("--engine", help="local (one process) or workers.")]
ProcessesOption = Annotated[int | None, typer.Option("--processes", min=1, help="Worker processes [one a core].")]


def main() -> None:
    """The entry of the `wardround` command: every error raised on purpose becomes one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("wardround").setLevel(logging.ERROR)
    try:
        app()
    except Interrupted as error:
        errors.print(f"[yellow]{error}[/]")
        sys.exit(130)
    except WardroundError as error:
        _fail(error)


def _fail(error: WardroundError) -> NoReturn:
    errors.print("[bold red]error:[/]", str(error), highlight=False, soft_wrap=True)
    if error.detail:
        errors.print(f"       ({error.detail})", style="dim", highlight=False, markup=False, soft_wrap=True)
    sys.exit(2)


@app.command()
def run(
    study: StudyFile,
    sites: SitesOption,
    out: OutOption = None,
    compare: Annotated[str, typer.Option("--compare", help="local,pooled: what to compare with.")] = "",
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Insist on going on with an earlier run.")] = False,
    engine: EngineOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Train a study, measure it, and write the report. Run it again to go on after any interruption."""
    from wardround.runner.session import run as run_study
    from wardround.study.load import load_study

    loaded = load_study(study, overrides or [])
    folder = out or Path("runs") / loaded.name
    with _watcher() as watcher:
        result = run_study(
            loaded,
            sites,
            folder,
            compare=_words(compare),
            engine=_engine(engine),
            processes=processes,
            resume=resume,
            watcher=watcher,
        )
    _summary(result)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where to write the results.")] = Path("runs/demo"),
    overrides: SetOption = None,
) -> None:
    """Make four hospitals of brain phantoms, train together, and compare with training alone and pooled."""
    from wardround.runner.demo import demo_study
    from wardround.runner.session import run as run_study

    console.print("Making brain phantoms for four hospitals, each with its own scanner ...")
    study, sites = demo_study(out / "data", overrides or [])
    with _watcher() as watcher:
        result = run_study(study, sites, out, compare=["local", "pooled"], watcher=watcher)
    _summary(result)


@app.command()
def evaluate(
    out: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    sites: SitesOption,
    engine: EngineOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Recompute every metric of result.json from the saved models and the data, and say whether they agree."""
    import json

    from wardround.runner.session import evaluate as evaluate_run

    with _watcher() as watcher:
        found = evaluate_run(out, sites, engine=_engine(engine), processes=processes, watcher=watcher)
    written = json.loads((out / "result.json").read_text(encoding="utf-8"))
    _table(found["metrics"], written["participants"])
    if found["metrics"] != written["metrics"]:
        raise WardroundError("the recomputed metrics differ from result.json: other data, models, or another machine?")
    console.print("Every metric agrees with result.json.")


@app.command()
def reconstruct(
    model: Annotated[Path, typer.Argument(help="A released model (models/ARM.safetensors).")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A NIfTI image, or k-space (.npy, coils x H x W).")],
    output: Annotated[Path, typer.Argument(help="The NIfTI file to write.")],
    site: Annotated[str | None, typer.Option("--site", help="Whose protocol to use [the study's].")] = None,
) -> None:
    """Reconstruct with a released model. A NIfTI image is scanned by the study's simulated scanner first."""
    from wardround.runner.apply import reconstruct as apply

    said = apply(model, source, output, site=site)
    console.print(said)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A folder of sites: SITE/PATIENT/CONTRAST.nii.gz.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write study.yaml and sites.yaml.")] = Path("."),
) -> None:
    """Propose a commented study file and a sites file for a folder of scans."""
    from wardround.data.convert import propose_study

    study, sites = propose_study(folder)
    targets = {out / "study.yaml": study, out / "sites.yaml": sites}
    for path in targets:
        if path.exists():
            raise WardroundError(f"{path.name} exists already; choose another --out", detail=str(path))
    out.mkdir(parents=True, exist_ok=True)
    for path, text in targets.items():
        path.write_text(text, encoding="utf-8")
    console.print(f"Wrote {out / 'study.yaml'} and {out / 'sites.yaml'}. Next: wardround check {out / 'study.yaml'}")


@app.command()
def check(
    study: StudyFile,
    sites: Annotated[Path | None, typer.Option("--sites", help="Also look at the data.")] = None,
    compare: Annotated[str, typer.Option("--compare", help="local,pooled")] = "",
    overrides: SetOption = None,
) -> None:
    """Explain what a study would do, without doing it."""
    from wardround.runner.explain import explain

    console.print(explain(study, sites, _words(compare), overrides or []), highlight=False, markup=False)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A file or folder.")]) -> None:
    """Say what a file or folder holds, without naming a patient."""
    from wardround.data.convert import inspect_path

    console.print(str(inspect_path(path)), highlight=False, markup=False)


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)


@convert_app.command("lgg")
def convert_lgg(
    download: Annotated[Path, typer.Argument(help="The unpacked public download (it holds kaggle_3m/).")],
    out: Annotated[Path, typer.Argument(help="The folder to write SITE/PATIENT/*.nii.gz into.")],
) -> None:
    """Convert the public LGG MRI segmentation collection."""
    from wardround.data.convert import convert_lgg as convert

    report = convert(download, out)
    patients = ", ".join(f"{site} {count}" for site, count in sorted(report.patients.items()))
    console.print(f"Patients by site: {patients}; {report.without_t1ce} without t1ce (FLAIR stands in).")


# What several commands share ---------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _engine(name: str | None) -> Any:
    if name not in (None, "local", "workers"):
        raise WardroundError(f"--engine {name}: choose local or workers")
    return name


@contextmanager
def _watcher() -> Iterator[Watcher | None]:
    if not console.is_terminal:
        yield None
        return
    from wardround.progress import LiveProgress

    with LiveProgress(console) as live:
        yield live


def _summary(result: Result) -> None:
    _table(result.values["metrics"], result.values["participants"])
    console.print(f"Report: {result.report}", soft_wrap=True)


def _table(metrics: dict[str, Any], participants: list[str]) -> None:
    first = next((m for rows in metrics.values() for m in rows.values() if m), None)
    if not first:
        return
    name = next(iter(first))
    name = "psnr" if "psnr" in first else name
    columns = [*participants, *sorted({s for row in metrics.values() for s in row} - {*participants})]
    columns.sort(key=lambda s: (s in ("mean", "unseen"), s == "unseen"))
    table = Table(title=f"{name} on test patients")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for arm, row in metrics.items():
        if arm != "baseline":
            cells = (row.get(c) for c in columns)
            table.add_row(arm, *(f"{cell[name]['value']:.2f}" if cell else "-" for cell in cells))
    console.print(table)

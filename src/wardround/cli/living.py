"""The commands of living models: go on from a release, and look after the chain of releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.shared import (
    AllowCodeOption,
    CompareOption,
    EngineOption,
    ProcessesOption,
    QuietOption,
    SetOption,
    StudyFile,
    console,
    say,
    summary,
    watching,
    words,
)
from wardround.errors import StudyError

if TYPE_CHECKING:
    from wardround.living.chain import Chain, Entry

releases_app = typer.Typer(
    help="Look after a chain of releases: what came of what, and which is in use.", no_args_is_help=True
)
ReleaseArgument = Annotated[
    str,
    typer.Argument(
        metavar="RELEASE", help="The folder of a finished run, a released model's file, or in a chain a number or hash."
    ),
]
ChainFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the chain.")]
ChainOption = Annotated[
    Path | None, typer.Option("--chain", metavar="FOLDER", help="The chain that the new model joins, or is refused in.")
]
EntryArgument = Annotated[str, typer.Argument(metavar="RELEASE", help="A number, the first digits of a hash, current.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


def update(
    release: ReleaseArgument,
    study: StudyFile,
    out: Annotated[Path, typer.Option("--out", help="Where to write the study, and its results.")],
    sites: Annotated[
        Path | None, typer.Option("--sites", help="Where each site's data lie; without it nothing runs here.")
    ] = None,
    chain: ChainOption = None,
    more_rounds: Annotated[
        int | None,
        typer.Option("--more-rounds", min=1, metavar="N", help="Train N more rounds with the same patients."),
    ] = None,
    train: Annotated[
        str, typer.Option("--train", metavar="SITES", help="Who has new patients (default: each site is asked).")
    ] = "",
    compare: CompareOption = "",
    overrides: SetOption = None,
    engine: EngineOption = None,
    processes: ProcessesOption = None,
    quiet: QuietOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Go on from a release with the patients that have come since, and promote the new model where no site loses.

    Only sites with new training patients train; the others measure. Without --sites the study is written for
    `wardround submit`. Exit code 1 where the new model is not promoted.
    """
    from wardround.living.chain import Chain
    from wardround.living.update import FISHER_FILE, STUDY_FILE, prepare, release_named
    from wardround.living.update import update as go_on

    kept = None if chain is None else Chain(chain)
    found = release_named(release, kept)
    if sites is None:
        if kept is not None:
            raise StudyError("--chain: nothing runs without --sites; add the run when it is finished: releases add")
        prepared = prepare(found, study, out, overrides=overrides or [], train=words(train), more_rounds=more_rounds)
        say(prepared.said)
        if (out / FISHER_FILE).exists():
            say(f"Wrote {out / FISHER_FILE}, which measures what the release must not lose. Hand it to the hospitals:")
            say(f"  wardround submit {out / FISHER_FILE} --federation FOLDER")
            say(f"Put its models/fisher.safetensors into {out}, and name it in {STUDY_FILE} (update.retain.fisher).")
        say(f"Wrote {out / STUDY_FILE}. Hand it to the hospitals:")
        say(f"  wardround submit {out / STUDY_FILE} --federation FOLDER")
        return
    with watching(quiet) as watcher:
        result = go_on(
            found,
            study,
            sites,
            out,
            overrides=overrides or [],
            train=words(train),
            more_rounds=more_rounds,
            chain=kept,
            compare=words(compare),
            engine=engine,
            processes=processes,
            watcher=watcher,
            allow_code=allow_code,
            told=say,
        )
    summary(result)
    if result.gate is not None and not result.gate.promoted:
        raise typer.Exit(1)


@releases_app.command("list")
def list_releases(folder: ChainFolder, as_json: JsonOption = False) -> None:
    """All entries, the oldest first; every model's file is read and compared with its entry."""
    from rich.table import Table

    _, entries, current = _chain(folder)
    if as_json:
        _print_json([_as_json(entry, current) for entry in entries])
        return
    table = Table(title="Releases")
    for name in ("", "", "release", "of", "study", "trained at", "when", "what"):
        table.add_column(name, overflow="fold", no_wrap=name in ("release", "when", "what"))
    for entry in entries:
        parent = "–" if entry.parent is None else _name(entries, entry.parent)
        mark = "in use" if current is not None and entry.number == current.number else ""
        table.add_row(
            str(entry.number),
            mark,
            entry.short,
            parent,
            entry.study,
            ", ".join(entry.sites),
            entry.time[:10],
            entry.kind,
        )
    console.print(table)
    for entry in entries:
        if entry.reason:
            say(f"{entry.number} {entry.kind}: {entry.reason}")


@releases_app.command("show")
def show_release(folder: ChainFolder, release: EntryArgument = "current", as_json: JsonOption = False) -> None:
    """One release: where it came from, who trained it, what it gave, where its model lies."""
    chain, _, current = _chain(folder)
    entry = chain.find(release)
    line = chain.ancestry(entry)
    model = chain.model(entry)
    if as_json:
        _print_json({**_as_json(entry, current), "ancestors": [one.release for one in line[1:]], "model": str(model)})
        return
    say(f"Release {entry.short}, entry {entry.number}: {entry.kind}{f' ({entry.reason})' if entry.reason else ''}")
    say(f"model_sha256 {entry.release}")
    say(f"Study {entry.study} ({entry.study_sha256[:12]}), trained at {', '.join(entry.sites) or 'no site'}")
    say("Came of " + (" of ".join(one.short for one in line[1:]) or "no other release in the chain"))
    for site, values in (entry.metrics or {}).items():
        say(f"  {site}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    say(f"Model: {model}")


@releases_app.command("diff")
def diff_releases(
    folder: ChainFolder, before: EntryArgument, after: EntryArgument, as_json: JsonOption = False
) -> None:
    """Two releases side by side: studies, sites, and every metric at every site, each on its own test patients."""
    from rich.table import Table

    chain, _, _ = _chain(folder)
    one, other = chain.find(before), chain.find(after)
    first, second = one.metrics or {}, other.metrics or {}
    rows = [
        (site, name, first.get(site, {}).get(name), second.get(site, {}).get(name))
        for site in dict.fromkeys((*first, *second))
        for name in dict.fromkeys((*first.get(site, {}), *second.get(site, {})))
    ]
    if as_json:
        metrics = [{"site": s, "metric": m, "before": was, "after": now} for s, m, was, now in rows]
        _print_json({"before": one.to_json(), "after": other.to_json(), "metrics": metrics})
        return
    for name, then, later in (
        ("study", one.study_sha256[:12], other.study_sha256[:12]),
        ("trained at", ", ".join(one.sites), ", ".join(other.sites)),
        ("came of", one.parent and one.parent[:12], other.parent and other.parent[:12]),
    ):
        say(f"{name}: {then or '–'}" if then == later else f"{name}: {then or '–'} -> {later or '–'}")
    table = Table(title=f"{one.short} and {other.short}")
    for name in ("site", "metric", one.short, other.short, "change"):
        table.add_column(name)
    for site, metric, was, now in rows:
        change = "" if was is None or now is None else f"{now - was:+.4g}"
        table.add_row(site, metric, *("–" if value is None else f"{value:.4g}" for value in (was, now)), change)
    console.print(table)
    say("Each on the test patients of its own run; the gate compares them on the same ones.")


@releases_app.command("rollback")
def roll_back(
    folder: ChainFolder,
    release: EntryArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why; it stands in the chain.")] = "",
) -> None:
    """Put an earlier release back into use. Nothing is deleted: the chain says that it was done, and when."""
    from wardround.living.chain import Chain

    entry = Chain(folder).rollback(release, reason)
    say(f"Release {entry.short} is in use again (entry {entry.number}).")
    say(f"Model: {Chain(folder).model(entry)}")


@releases_app.command("add")
def add_release(
    folder: ChainFolder, run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]
) -> None:
    """Put the model of a finished run into a chain, as its first release or behind the one that it came of."""
    from wardround.living.chain import Chain
    from wardround.living.release import Release

    entry = Chain(folder).add(Release.at(run))
    say(f"Entry {entry.number}: {entry.short} {entry.kind}{f' ({entry.reason})' if entry.reason else ''}")


def _chain(folder: Path) -> tuple[Chain, tuple[Entry, ...], Entry | None]:
    """The chain in a folder, checked, its entries, and the release in use; raises `StudyError` where there is none."""
    from wardround.living.chain import Chain

    if not Chain.is_chain(folder):
        raise StudyError(
            "the folder holds no chain of releases; `wardround releases add` begins one", detail=str(folder)
        )
    chain = Chain(folder)
    return chain, chain.check(), chain.current()


def _as_json(entry: Entry, current: Entry | None) -> dict[str, object]:
    return {**entry.to_json(), "current": current is not None and entry.number == current.number}


def _name(entries: tuple[Entry, ...], release: str) -> str:
    return next((f"{one.number}" for one in entries if one.release == release), release[:12])


def _print_json(value: object) -> None:
    console.print_json(json.dumps(value))

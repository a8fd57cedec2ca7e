"""What `inspect` prints of several sites: how unlike their images are, and what that costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from wardround.cli.shared import complain, console, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wardround.results.heat import HeatTable


def describe_sites(
    sites: Path,
    study: Path | None,
    out: Path | None,
    landmarks: Path | None,
    *,
    as_json: bool,
    allow_code: bool,
) -> None:
    """Describe the images of the sites of a study, on the terminal and in a page."""
    from wardround.results.shift_page import class_table, distance_table, number_table
    from wardround.runs.across import inspect_across

    # The name of the study is in its file, which is read below.
    folder = out or Path("runs") / f"{'sites' if study is None else study.stem}-shift"
    shift = inspect_across(sites, study, folder, landmarks=landmarks, allow_code=allow_code)
    if as_json:
        console.file.write(shift.values)
    else:
        head, rows = number_table(shift)
        console.print(_table(f"{shift.study}: the images of each site ({shift.normalised})", head, rows))
        for kind, words in (
            ("intensity", "Histograms: Jensen-Shannon divergence in bits, 0 to 1"),
            ("spectrum", "Spectra: root mean square difference of log amplitudes"),
        ):
            if (distances := distance_table(shift.distances.get(kind, {}))) is not None:  # type: ignore[call-overload]
                console.print(_heat(words, distances))
        if (classes := class_table(shift)) is not None:
            console.print(_heat("Classes: share of a site's patients", classes))
    for site, profile in shift.sites.items():
        for what, why in profile.withheld.items():
            complain(f"{site} keeps {what}: {why}")
    for site, why in shift.failed.items():
        complain(f"{site} gave no answer: {why}")
    if not as_json:
        say(f"Page: {folder / 'shift.html'}")
        if landmarks is not None:
            say(f"Landmarks: {landmarks}: put them into the study")


def show_matrix(out: Path, *, as_json: bool) -> None:
    """Print what each site's own model gives at each site of a finished run."""
    from wardround.results.cost import costs_of, matrix_table
    from wardround.results.files import read_result

    result = read_result(out)
    found = costs_of(result)
    if as_json:
        console.file.write(json.dumps([each.model_dump(mode="json") for each in found], indent=2) + "\n")
        return
    for each in found:
        console.print(_heat(each.caption, matrix_table(each)))


def _heat(title: str, table: HeatTable) -> Table:
    rows = [(name, *(f"{c.text}\n{c.below}" if c.below else c.text for c in cells)) for name, cells in table.rows]
    return _table(title, (table.corner, *table.columns), rows)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    found = Table(title=title, title_justify="left")
    for number, name in enumerate(head):
        found.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        found.add_row(*row)
    return found

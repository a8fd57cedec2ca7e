"""One folder of patients, parted among the sites of a study: a list of patients for each, and a sites file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from wardround.errors import DataError, StudyError
from wardround.imaging.datasets.partition import How, Shares, by_value, part
from wardround.imaging.datasets.split import Parts, Role
from wardround.imaging.readers.table import table_rows
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.tasks import Split
from wardround.tasks.build import build_task
from wardround.tasks.task import Dealing
from wardround.wire.files import written

SITES = "sites.yaml"


def partition(
    study: Study | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    how: How = "even",
    column: str | None = None,
    table: str | Path | None = None,
    patient: str = "patient",
    alpha: float = 0.5,
    least: int = 3,
    seed: int | None = None,
) -> dict[str, int]:
    """Part the patients of `data` among the sites of a study, and write `OUT/sites.yaml` and `OUT/SITE.txt`.

    `how` is that of `wardround.imaging.datasets.partition.part`; `labels` reads each patient's label from `column` of
    `table`, a CSV in which `patient` names the patient (a path, or a name relative to `data`). A `column` without
    `labels` gives each patient to the site that it names. `seed` is the study's by default. The images are found as the
    study's task finds them, and neither copied nor changed. Number of patients by site. Raises StudyError, and
    DataError for a table or images that cannot be read, before anything is written.
    """
    loaded = study if isinstance(study, Study) else load_study(study)
    folder, target = Path(data).resolve(), Path(out)
    if how == "labels" and column is None:
        raise StudyError("a partition by labels needs the column of the table that holds them")
    patients = _patients(loaded, folder)
    values = None if column is None else _column(folder / (table or "labels.csv"), patient, column, patients)
    if values is None or how == "labels":
        number = loaded.seed if seed is None else seed
        shares = part(patients, list(loaded.sites), how, seed=number, alpha=alpha, least=least, labels=values)
    else:
        shares = _named(by_value(values), loaded, column or "")
    target.mkdir(parents=True, exist_ok=True)
    for site, own in shares.items():
        with written(target / f"{site}.txt") as file:
            file.write("".join(f"{name}\n" for name in own).encode())
    with written(target / SITES) as file:
        file.write(_sites_file(folder, shares).encode())
    return {site: len(own) for site, own in shares.items()}


def _patients(study: Study, folder: Path) -> list[str]:
    """The names of the patients in a folder, as the study's task sees them."""
    task, seen = build_task(study), list[str]()
    if not isinstance(task, Dealing):
        raise StudyError("task: parts its patients by itself, so a list of patients has no effect on it")

    def look(site: str, names: Sequence[str], split: Split, seed: int, role: Role) -> Parts:
        seen.extend(names)
        return {"train": (), "validation": (), "test": tuple(range(len(names)))}

    task.deal_by(look)
    task.dataset(next(iter(study.sites)), (folder,))
    return seen


def _column(path: Path, patient: str, column: str, patients: Sequence[str]) -> dict[str, str]:
    """What a table says of each patient. Raises DataError for one that says two things of one, or nothing."""
    found: dict[str, str] = {}
    for number, row in table_rows(path, (patient, column), path.name):
        whose, value = row[patient], row[column]
        if found.setdefault(whose, value) != value:
            raise DataError(f"{path.name}: line {number} gives a patient a second {column}", detail=whose)
    lacking = [name for name in patients if not found.get(name)]
    if lacking:
        raise DataError(
            f"{path.name}: {len(lacking)} of {len(patients)} patients have no {column}", detail=", ".join(lacking[:20])
        )
    return {name: found[name] for name in patients}


def _named(shares: Shares, study: Study, column: str) -> Shares:
    if set(shares) != set(study.sites):
        raise StudyError(
            f"the column {column} holds {', '.join(shares)}, and the study's sites are {', '.join(study.sites)}; name "
            "the sites as the column does"
        )
    return shares


def _sites_file(folder: Path, shares: Mapping[str, Sequence[str]]) -> str:
    entries = "".join(
        f"  {site}:\n    data: {json.dumps(str(folder), ensure_ascii=False)}\n    patients: {site}.txt\n"
        for site in shares
    )
    return f"# One folder, parted by `wardround partition`: each list names the patients of a site.\nsites:\n{entries}"

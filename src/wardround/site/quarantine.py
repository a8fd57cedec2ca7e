"""Patients whose files cannot be used, at their site: too many of them stop it, and a list in its folder names them."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path

from wardround.federation.facts import Patients
from wardround.imaging.readers.aside import Aside, groups, too_many
from wardround.learning.training import patients_in
from wardround.site.egress import EgressRules
from wardround.tasks.task import Dataset, SetsAside
from wardround.wire.files import reason, write_text

log = logging.getLogger(__name__)
LIST = "set_aside.csv"
COLUMNS = ("patient", "reason", "file or row")


def check_share(site: str, total: int, aside: Sequence[Aside], share: float) -> None:
    """Raises `DataError` where more than `share` of a site's `total` patients are set aside.

    Its message may leave the site: it gives the most frequent reason and no number.
    """
    if len(aside) > share * total:
        limit = f"more of its patients cannot be used than it goes on without (`quarantine`: {100 * share:.3g} %)"
        fix = "mend their files, or raise `quarantine` in the sites file"
        raise too_many(site, aside, f"{limit}; {fix}. The most frequent reason: ")


def counted(dataset: Dataset, egress: EgressRules) -> tuple[Patients, int | None]:
    """Numbers of a site's patients, and of those set aside, as its rules let them out."""
    counts = patients_in(dataset)
    if not isinstance(dataset, SetsAside):
        return Patients(**egress.counts(counts)), 0
    aside = {str(split): count for split, count in dataset.set_aside().items()}
    number = sum(aside.values()) + dataset.set_aside_unknown()
    return Patients(**egress.counts_without(counts, aside)), egress.counts({"all": number})["all"]


def keep_list(site: str, aside: Sequence[Aside], folder: Path | None) -> None:
    """Say at the site who is set aside and why: a CSV below `folder`, none for a site that encrypts its records.

    The list names patients and files, and is in no message; the log names none.
    """
    where = "`wardround check` says why"
    if folder is not None:
        path = folder / "sites" / site / LIST
        where = f"{LIST} in its folder says whom and why"
        try:
            if aside:
                write_text(path, _table(aside))
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            where = f"the list of them cannot be written ({reason(error)})"
    if aside:
        log.warning("site %s: some patients are set aside, for their files cannot be used; %s", site, where)


def _table(aside: Sequence[Aside]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((one.patient, one.reason, " ".join(one.detail.split())) for one in aside)
    return text.getvalue()


def summary(aside: Sequence[Aside]) -> str:
    """How many patients are set aside for which reasons, for eyes at the site; empty where none is."""
    reasons = "; ".join(f"{group.count}: {group.reason}" for group in groups(aside))
    return f"{len(aside)} patients set aside ({reasons})" if aside else ""

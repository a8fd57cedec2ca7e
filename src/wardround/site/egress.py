"""What a site lets out: kinds of answers, what their headers say, metrics, and no sums over a handful of patients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from wardround.errors import Withheld
from wardround.federation.exchange import DONE, UPDATE
from wardround.federation.facts import LOCAL_SHA256
from wardround.federation.logs import HEAD
from wardround.federation.parts import LACKS, lacked
from wardround.storage.hash_log import is_hash
from wardround.wire.message import Message


@dataclass(frozen=True)
class EgressRules:
    """A site's rules; they are its own and no part of the study.

    A sum over fewer than `minimum_cohort` patients is withheld: what is known of four patients and of five gives away
    the fifth. Across hospitals 11 is usual (cells under 11 are suppressed in releases of the US CMS). `floor` is the
    least that a site's rules cannot go below: 1 where one machine holds all data, `ACROSS_HOSPITALS` for an agent.
    `scanner_facts`: a released model may say what headers name of the site's scanners; no message ever does.
    """

    per_site_results: bool = True
    metrics: frozenset[str] | None = None
    minimum_cohort: int = 1
    scanner_facts: bool = True
    floor: int = 1

    @property
    def least(self) -> int:
        """The fewest patients whose sums or mean may leave."""
        return max(self.floor, self.minimum_cohort)

    def refusal(self, values: Mapping[str, Any]) -> str | None:
        """Why sums of these values, metric -> one for each patient, may not leave; nothing when they may.

        It says all or nothing: some metrics without the others would break the mean over sites.
        """
        hidden = sorted(set(values) - self.metrics) if self.metrics is not None else []
        if hidden:
            return f"{', '.join(hidden)} not in egress.metrics"
        fewest = min(map(len, values.values()), default=self.least)
        if fewest < self.minimum_cohort:
            return "fewer patients than egress.minimum_cohort"
        return f"fewer than {self.floor} patients" if fewest < self.floor else None

    def counts(self, patients: Mapping[str, int]) -> dict[str, int | None]:
        """Numbers of patients as they may be told: nothing in place of a handful, while none at all names nobody."""
        return {what: None if 0 < count < self.least else count for what, count in patients.items()}

    def counts_without(self, patients: Mapping[str, int], aside: Mapping[str, int]) -> dict[str, int | None]:
        """Numbers of patients as `counts`, and nothing where a handful of them was set `aside`.

        Which files fit a study the study's words decide: two studies of which one sets a patient aside for a value of
        the mask would count the patients with that value by the difference.
        """
        counts = self.counts(patients)
        return {what: None if 0 < aside.get(what, 0) < self.least else count for what, count in counts.items()}


OPEN = EgressRules()
# What is computed from fewer patients gives them away, whatever a site's own file says.
ACROSS_HOSPITALS = 5


def strictest(rules: Iterable[EgressRules]) -> EgressRules:
    """Rules that keep all of the given ones."""
    together = OPEN
    for one in rules:
        lists = [names for names in (together.metrics, one.metrics) if names is not None]
        together = EgressRules(
            together.per_site_results and one.per_site_results,
            frozenset.intersection(*lists) if lists else None,
            max(together.minimum_cohort, one.minimum_cohort),
            together.scanner_facts and one.scanner_facts,
            max(together.floor, one.floor),
        )
    return together


def check_egress(reply: Message, layouts: Mapping[str, int], phases: Set[str]) -> None:
    """Refuse to send an answer that is of no known kind or says more than its kind does; raises `Withheld`.

    `layouts` are the study's, with the bytes that an update of each has; `phases` are the kinds of answers of the
    secure sum, whose schema is checked where they are made. It is the last door: whatever made the answer, nothing else
    gets past it.
    """
    header = reply.header
    if header.kind in phases:
        known = header.body_nbytes == 0
    elif header.kind == UPDATE:
        known = header.meta.keys() <= {"layout", HEAD}
        # Neither more nor less than the numbers that the layout names.
        known = known and layouts.get(str(header.meta.get("layout"))) == header.body_nbytes
    elif header.kind == LACKS:
        known = header.body_nbytes == 0 and bool(lacked(reply))
    else:
        known = header.kind == DONE and not header.body_nbytes and header.meta.keys() <= {LOCAL_SHA256}
        known = known and all(is_hash(value) for value in header.meta.values())
    if not known or header.tensors or reply.body.nbytes != header.body_nbytes:
        raise Withheld(f"site {header.site} lets out no such answer as {header.kind[:40]!r} with what this one holds")

"""`wardround audit`: from files to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wardround.audit.auditor import Auditor, Effort
from wardround.audit.epsilon import Claim
from wardround.audit.inversion import ATTACKS, Attack
from wardround.audit.results import PARTS, Audit, write_audit
from wardround.audit.signature import holds_audit, identity_of, sign
from wardround.errors import StudyError
from wardround.runs.folder import refuse_foreign
from wardround.storage.cipher import StoreCipher
from wardround.study.schema import Study
from wardround.study.sites import SitesFile


def audit(
    study: Study,
    sites: SitesFile,
    site: str,
    out: Path,
    *,
    model: Path | None = None,
    claim: Claim | None = None,
    quick: bool = False,
    trials: int | None = None,
    pictures: bool = False,
    attacks: Sequence[Attack] = ATTACKS,
    parts: Sequence[str] = PARTS,
    store: Path | None = None,
    near: Path | None = None,
) -> Audit:
    """Audit a site on its own data and write audit.json, audit.html and their signature into `out`.

    They are signed with the site's own key, which lies in `store` (see `identity_of`). `start.file` of the study is
    relative to `near`, without one to the working folder.

    `model` is a released model of the study or the folder of its run; without one, the initial weights are audited.
    `parts` of PARTS are done, and the lint always; nothing but the lint where there are none.
    Raises StudyError and DataError where study, model or data do not fit, and JournalError where `out` holds anything
    but an audit of the same site.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise StudyError(f"--only: there is no part {unknown[0]!r}; choose among lint, {', '.join(PARTS)}")
    refuse_foreign(out, ours=holds_audit(out, site))
    effort = Effort.of(quick=quick, trials=trials)
    entry = sites.sites.get(site)
    places = study.places(near or Path(), [] if entry is None else [entry])
    auditor = Auditor(study, sites, site, effort, model=model, attacks=attacks, claim=claim, places=places)
    found = auditor.run(quick=quick, parts=[part for part in PARTS if part in parts])
    run = model if model is not None and model.is_dir() else None
    identity = identity_of(site, out, run, store, StoreCipher.of(sites.key(site)))
    write_audit(found, out, pictures=pictures)
    sign(out, site, found.study_sha256, identity)
    return found

"""What a process needs to know to be the agent of one site: its studies and its own entry of the sites file.

Imports neither torch nor what opens data: a process that only starts others stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.site.egress import ACROSS_HOSPITALS
from wardround.study.hashes import written
from wardround.study.schema import Study
from wardround.study.sites import SitesFile


@dataclass(frozen=True)
class AgreedStudy:
    """A study that a site takes part in, its comparisons, and the folder where the site keeps what is its own.

    With `plan_sha256` the site takes part only while this version resolves the study to that plan.
    """

    study: Study
    folder: Path
    compare: tuple[str, ...] = ()
    plan_sha256: str | None = None


def spec_of(
    name: str,
    sites: SitesFile,
    spool: Path | None,
    agreed: Sequence[AgreedStudy],
    *,
    rounding_root: bytes | None = None,
    floor: int = ACROSS_HOSPITALS,
    identity: Path | None = None,
    package: str | None = None,
) -> dict[str, Any]:
    """What a process needs to be the agent of one site (`wardround.site.process.agent_finder`).

    Messages' bodies are spooled into the folder `spool`; without one they lie in files that both processes read.
    Nothing measured on fewer than `floor` patients leaves. In all studies the site signs with the key in the file
    `identity`; without one, with a key of each study's own. The process refuses to begin in another version than
    `package`.
    """
    return {
        "site": name,
        "entry": sites.of(name).model_dump(mode="json"),
        "allow_code": sites.allows_code,
        "rounding_root": None if rounding_root is None else rounding_root.hex(),
        **({} if spool is None else {"spool": str(spool)}),
        "floor": floor,
        "identity": None if identity is None else str(identity),
        "package": package,
        "studies": [
            {
                "study": written(a.study),
                "folder": str(a.folder),
                "compare": list(a.compare),
                "plan_sha256": a.plan_sha256,
            }
            for a in agreed
        ],
    }

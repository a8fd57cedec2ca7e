"""A process that is one site: the agents of its studies, each with a folder of its own, behind one finder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.errors import StudyError, WireError
from wardround.federation.exchange import Party
from wardround.plan.arm_specs import ArmSpecs
from wardround.site.agent import Agent, Progress
from wardround.site.datasets import Datasets
from wardround.site.egress import ACROSS_HOSPITALS
from wardround.study.hashes import written
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile
from wardround.wire.message import Header


@dataclass(frozen=True)
class AgreedStudy:
    """A study that a site takes part in, its comparisons, and the folder where the site keeps what is its own."""

    study: Study
    folder: Path
    compare: tuple[str, ...] = ()


def spec_of(
    name: str,
    sites: SitesFile,
    spool: Path,
    agreed: Sequence[AgreedStudy],
    *,
    rounding_root: bytes | None = None,
    floor: int = ACROSS_HOSPITALS,
) -> dict[str, Any]:
    """What a process needs to be the agent of one site (`agent_finder`): its studies, and its own entry of `sites`.

    Messages' bodies are spooled into the folder `spool`. Nothing measured on fewer than `floor` patients leaves.
    """
    return {
        "site": name,
        "entry": sites.of(name).model_dump(mode="json"),
        "allow_code": sites.allows_code,
        "rounding_root": None if rounding_root is None else rounding_root.hex(),
        "spool": str(spool),
        "floor": floor,
        "studies": [{"study": written(a.study), "folder": str(a.folder), "compare": list(a.compare)} for a in agreed],
    }


def agent_finder(spec: dict[str, Any], progress: Progress | None = None) -> Callable[[Header], Party]:
    """The entry of a process that is the agent of one site (see `wardround.engines.worker`)."""
    name, entry = str(spec["site"]), SiteData.model_validate(spec["entry"])
    sites = SitesFile(sites={name: entry})
    plugins = Plugins({name: frozenset(entry.plugins)}, bool(spec["allow_code"]))
    embeddings = {} if entry.embeddings is None else {name: entry.embeddings}
    root = None if spec["rounding_root"] is None else bytes.fromhex(spec["rounding_root"])
    agents: dict[str, Agent] = {}
    for agreed in spec["studies"]:
        study = Study.model_validate(agreed["study"])
        arm_specs = ArmSpecs(study, tuple(agreed["compare"]), embeddings, plugins, study.places(Path(), [entry]))
        folder = Path(agreed["folder"])
        datasets = Datasets(arm_specs, sites, int(spec["floor"]), folder)
        agent = Agent(name, arm_specs, sites, folder, datasets, progress=progress, rounding_root=root)
        agents |= dict.fromkeys(agent.identities, agent)

    def find(header: Header) -> Party:
        if header.site != name:
            raise WireError(f"a message for another site reached {name}")
        if header.study not in agents:
            raise StudyError(f"site {name} takes part in no such study or arm")
        return agents[header.study].find(header)

    return find

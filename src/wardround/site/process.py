"""A process that is one site: the agents of its studies, each with a folder of its own, behind one finder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from wardround.errors import StudyError, WardroundError, WireError
from wardround.federation.exchange import Party
from wardround.plan.arm_specs import ArmSpecs
from wardround.protection.identity import Identity
from wardround.site.agent import Agent
from wardround.site.agreed import AgreedStudy as AgreedStudy
from wardround.site.agreed import spec_of as spec_of
from wardround.site.arms import Progress
from wardround.site.datasets import Datasets
from wardround.site.holdings import Holdings
from wardround.study.load import load_study
from wardround.study.plugins import Plugins
from wardround.study.sites import SiteData, SitesFile
from wardround.version import __version__
from wardround.wire.message import Header


def agent_finder(spec: dict[str, Any], progress: Progress | None = None) -> Callable[[Header], Party]:
    """The entry of a process that is the agent of one site (see `wardround.engines.worker`).

    What is wrong with a specification is the answer to each message, and is looked at again with the next one: another
    version than it names, other defaults, a key that cannot be read.
    """
    made: list[Callable[[Header], Party]] = []

    def find(header: Header) -> Party:
        if not made:
            made.append(_finder(spec, progress))
        return made[0](header)

    with suppress(WardroundError):
        made.append(_finder(spec, progress))
    return find


def agents_of(spec: dict[str, Any], progress: Progress | None = None) -> list[Agent]:
    """The agents of a specification, one a study; raises `StudyError` as `agent_finder` says."""
    if spec["package"] not in (None, __version__):
        raise StudyError(
            f"Wardround {spec['package']} was at work here, and {__version__} is installed now: end the site's process "
            "and start it again"
        )
    name, entry = str(spec["site"]), SiteData.model_validate(spec["entry"])
    sites = SitesFile(sites={name: entry})
    plugins = Plugins({name: frozenset(entry.plugins)}, bool(spec["allow_code"]))
    embeddings = {} if entry.embeddings is None else {name: entry.embeddings}
    root = None if spec["rounding_root"] is None else bytes.fromhex(spec["rounding_root"])
    identity = None if spec["identity"] is None else _key(Path(spec["identity"]))
    agents: list[Agent] = []
    for agreed in spec["studies"]:
        study = load_study(agreed["study"])
        folder = Path(agreed["folder"])
        # Below the study's own folder, and never where the process happens to work: a study names files as it likes.
        arm_specs = ArmSpecs(study, tuple(agreed["compare"]), embeddings, plugins, study.places(folder, [entry]))
        if agreed["plan_sha256"] not in (None, arm_specs.plan_sha256):
            raise StudyError("this version fills in other defaults of the study than those that were agreed on")
        if folder.is_dir():
            arm_specs.aside = folder
        datasets = Datasets(arm_specs, sites, int(spec["floor"]), folder)
        held = Holdings(name, arm_specs, sites, folder, datasets, rounding_root=root, given=identity)
        agents.append(Agent(held, progress))
    return agents


def _finder(spec: dict[str, Any], progress: Progress | None) -> Callable[[Header], Party]:
    name = str(spec["site"])
    agents = {identity: agent for agent in agents_of(spec, progress) for identity in agent.identities}

    def find(header: Header) -> Party:
        if header.site != name:
            raise WireError(f"a message for another site reached {name}")
        if header.study not in agents:
            raise StudyError(f"site {name} takes part in no such study or arm")
        return agents[header.study].find(header)

    return find


def _key(path: Path) -> Identity:
    """The key with which the site signs in all its studies."""
    try:
        return Identity(bytes.fromhex(path.read_text(encoding="ascii")))
    except (OSError, ValueError):
        raise StudyError("the site's key cannot be read; restore it from a copy", detail=str(path)) from None

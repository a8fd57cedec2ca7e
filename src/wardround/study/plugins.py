"""The code that a study names: installed entry points that the sites allow by name, and nothing else unless asked.

A study may come from strangers. What it names is neither called nor imported before this page has said yes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal

from wardround.errors import StudyError
from wardround.study.methods import CustomMethod
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.study.tasks import CustomTask

Part = Literal["task", "method"]
GROUPS: Mapping[Part, str] = {"task": "wardround.tasks", "method": "wardround.methods"}


@dataclass(frozen=True)
class Plugins:
    """Which factories may be called: the names that each site allows, or with `code` whatever the study names."""

    allowed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    code: bool = False

    @staticmethod
    def of(study: Study, sites: SitesFile) -> Plugins:
        """What the sites of a study allow, those without data of their own aside."""
        entries = {name: sites.sites.get(name) for name, site in study.sites.items() if not site.scans}
        allowed = {name: frozenset(() if entry is None else entry.plugins) for name, entry in entries.items()}
        return Plugins(allowed, sites.allows_code)

    def refusal(self, part: Part, factory: str) -> str | None:
        """Why a factory is not called, and what to do; `None` for one that may be. Imports nothing."""
        if self.code:
            return None
        if ":" in factory:
            return (
                f"{part}.factory: {factory!r} is code by its place, and a study from others could name any. If you "
                "wrote the study or have read that code, and the machine is yours, give --allow-code (Python: "
                f"allow_code=True). A study for others names an installed entry point of the group {GROUPS[part]}"
            )
        lacking = [site for site, names in self.allowed.items() if factory not in names]
        if lacking or not self.allowed:
            whose = f"site {lacking[0]} does not" if lacking else "no sites file was given to"
            return (
                f"{part}.factory: {whose} allow the plug-in {factory!r}. If the site trusts that package, add its name "
                f"to sites.{lacking[0] if lacking else 'NAME'}.plugins in the sites file"
            )
        return None

    def refused(self, study: Study) -> Iterator[str]:
        """Why what a study names is not called: a reason for each factory."""
        named: dict[Part, str] = {}
        if isinstance(study.task, CustomTask):
            named["task"] = study.task.factory
        if isinstance(study.method, CustomMethod):
            named["method"] = study.method.factory
        for part, factory in named.items():
            if (why := self.refusal(part, factory)) is not None:
                yield why

    def load(self, part: Part, factory: str) -> Any:
        """The callable that a study names. Raises `StudyError` where it is not allowed, or cannot be imported."""
        if (why := self.refusal(part, factory)) is not None:
            raise StudyError(why)
        points = {point.value: point for point in entry_points(group=GROUPS[part], name=factory)}
        if len(points) > 1:
            raise StudyError(
                f"{part}.factory: several installed packages have an entry point {factory!r} of the group "
                f"{GROUPS[part]}; uninstall all but one",
                detail=", ".join(sorted(points)),
            )
        try:
            for point in points.values():
                return point.load()
            module, colon, name = factory.partition(":")
            if not colon:
                raise ImportError(f"no entry point {factory!r}")
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            installed = ", ".join(sorted(entry_points(group=GROUPS[part]).names)) or "none"
            raise StudyError(
                f"{part}.factory: {factory!r} cannot be imported; check the spelling, and that its package is "
                f"installed in this environment (entry points of the group {GROUPS[part]}: {installed})",
                detail=str(error),
            ) from error


NO_PLUGINS = Plugins()

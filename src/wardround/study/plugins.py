"""The code that a study names: installed entry points that the sites allow by name, and nothing else unless asked.

A study may come from anywhere. What it names is neither called nor imported before this page has said yes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal

from wardround.errors import StudyError
from wardround.study.base import Settings, at
from wardround.study.baselines import Baseline
from wardround.study.load import validate, written
from wardround.study.methods import CustomMethod
from wardround.study.registry import (
    BASELINES,
    BASES,
    BUILTIN,
    GROUPS,
    READERS,
    Reading,
    Section,
    baseline,
    check_baseline,
)
from wardround.study.schema import Study
from wardround.study.sites import SitesFile
from wardround.study.tasks import CustomTask, Modality

Part = Section | Literal["baseline"]
COMPARED = "task.evaluation.baselines"


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

    def refusal(self, part: Part, factory: str, key: str | None = None) -> str | None:
        """Why a factory is not called, and what to do; `None` for one that may be. Imports nothing.

        `key` is where in the study it is named, PART.factory without one.
        """
        key = key or f"{part}.factory"
        if self.code:
            return None
        if ":" in factory:
            return (
                f"{key}: {factory!r} is code by its place, and a study from others could name any. If you wrote the "
                "study or have read that code, and the machine is yours, give --allow-code (Python: "
                f"allow_code=True). A study for others names an installed entry point of the group {GROUPS[part]}"
            )
        lacking = [site for site, names in self.allowed.items() if factory not in names]
        if lacking or not self.allowed:
            whose = f"site {lacking[0]} does not" if lacking else "no sites file was given to"
            return (
                f"{key}: {whose} allow the plug-in {factory!r}. If the site trusts that package, add its name "
                f"to sites.{lacking[0] if lacking else 'NAME'}.plugins in the sites file"
            )
        return None

    def refused(self, study: Study) -> Iterator[str]:
        """Why what a study names is not called: a reason for each factory."""
        for key, part, section in study.sections():
            why = None
            if isinstance(section, CustomTask | CustomMethod):
                why = self.refusal(part, section.factory)
            elif section.closed:
                why = self.refusal(part, section.kind, f"{key}.kind")
            if why is not None:
                yield why
        # A task that says nothing of classical methods has baselines of its own.
        for name in study.baselines if study.task.classical is not None else ():
            if name not in BASELINES and (why := self.refusal("baseline", name, COMPARED)) is not None:
                yield why

    def opened(self, study: Study, *, partly: bool = False) -> Study:
        """The study with the sections of plug-ins read by their settings, which fill in defaults.

        As it is where it names none, or one that may not be called; `partly`: those that may be called are read.
        Raises `StudyError` where one cannot be imported, or refuses its section.
        """
        if not partly and any(self.refused(study)):
            return study
        found = self.settings(study)
        return validate(Study, written(study), "study", context=Reading(found, foreign=partly)) if found else study

    def settings(self, study: Study) -> dict[tuple[Section, str], type[Settings]]:
        """The settings of a study's plug-ins that may be called; imports them."""
        closed = {(part, section.kind): f"{key}.kind" for key, part, section in study.sections() if section.closed}
        return {
            (part, kind): self._settings(part, kind, key)
            for (part, kind), key in closed.items()
            if self.refusal(part, kind, key) is None
        }

    def _settings(self, part: Section, kind: str, key: str) -> type[Settings]:
        """The settings class that an entry point is."""
        settings, base = self.load(part, kind, key), BASES[part]
        if not (isinstance(settings, type) and issubclass(settings, base)):
            custom = f"; if it is a factory, write `{part}: {{kind: custom, factory: {kind}}}`"
            raise StudyError(
                f"{key}: the plug-in {kind!r} is not a {base.__name__}{custom if 'custom' in BUILTIN[part] else ''}"
            )
        if part == "acquisition" and not getattr(settings, "modality", ""):
            raise StudyError(f"{key}: the plug-in {kind!r} says no `modality`; its class must name one")
        return settings

    def baseline(self, name: str, modality: Modality) -> Baseline:
        """A baseline by its name. Raises `StudyError` where it is not allowed, no baseline, or not for a modality."""
        found = baseline(name) if name in BASELINES else self.load("baseline", name, COMPARED)
        if not isinstance(found, Baseline):
            raise StudyError(f"{COMPARED}: the plug-in {name!r} is not a wardround.study.baselines.Baseline")
        check_baseline(name, found, modality)
        return found

    def load(self, part: Part, factory: str, key: str | None = None) -> Any:
        """What a study names. Raises `StudyError` where it is not allowed, or cannot be imported."""
        key = key or f"{part}.factory"
        if (why := self.refusal(part, factory, key)) is not None:
            raise StudyError(why)
        points = {point.value: point for point in entry_points(group=GROUPS[part], name=factory)}
        if len(points) > 1:
            raise StudyError(
                f"{key}: several installed packages have an entry point {factory!r} of the group "
                f"{GROUPS[part]}; uninstall all but one",
                detail=", ".join(sorted(points)),
            )
        try:
            for point in points.values():
                return point.load()
            if ":" not in factory:
                raise ImportError(f"no entry point {factory!r}")
            return at(factory)
        except (ImportError, AttributeError, ValueError) as error:
            installed = ", ".join(sorted(entry_points(group=GROUPS[part]).names)) or "none"
            raise StudyError(
                f"{key}: {factory!r} cannot be imported; check the spelling, and that its package is "
                f"installed in this environment (entry points of the group {GROUPS[part]}: {installed})",
                detail=str(error),
            ) from error

    def readers(self, site: str) -> dict[str, Any]:
        """By ending (".raw") what reads a file, of the readers that a site allows; imports those alone.

        No study names a reader, so `code` opens none. A site without an entry (one that scans others' patients, the
        pool of all) has those that every site allows. Raises `StudyError` for one that cannot be imported.
        """
        everywhere = frozenset.intersection(*self.allowed.values()) if self.allowed else frozenset()
        names = self.allowed.get(site, everywhere)
        found: dict[str, Any] = {}
        for point in entry_points(group=READERS):
            if point.name not in names:
                continue
            if f".{point.name}" in found:
                raise StudyError(
                    f"sites.{site}.plugins: several installed packages read .{point.name} files; uninstall all but one"
                )
            try:
                found[f".{point.name}"] = point.load()
            except (ImportError, AttributeError) as error:
                raise StudyError(
                    f"sites.{site}.plugins: the reader of .{point.name} files cannot be imported; mend or remove it",
                    detail=str(error),
                ) from error
        return found


NO_PLUGINS = Plugins()

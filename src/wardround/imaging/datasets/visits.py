"""Test patients of several sites as the patients of one more scanner. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from numpy.typing import NDArray

from wardround.imaging.datasets.mri import SliceExample
from wardround.imaging.datasets.split import SplitName
from wardround.imaging.orientation import Turn
from wardround.study.tasks import Slices


class Index(Protocol):
    """The examples of one site: `SliceIndex` and `CTIndex` are such."""

    @property
    def site(self) -> str:
        """The site's name."""
        ...

    def name(self, patient: int) -> str:
        """The name of a patient's folder."""
        ...

    def patients(self, split: SplitName) -> tuple[int, ...]:
        """The numbers of the patients of a split, ascending."""
        ...

    def examples(self, split: SplitName, slices: Slices | None = None) -> tuple[SliceExample, ...]:
        """The examples of a split; `slices` replaces the own rule."""
        ...

    def image(self, example: SliceExample) -> NDArray[Any]:
        """A slice as the scanner sees it."""
        ...

    def mask(self, example: SliceExample) -> NDArray[Any]:
        """Where the head or the body is, on the grid of the image."""
        ...

    def turn(self, example: SliceExample) -> Turn | None:
        """How a slice is shown to people; None for as it is."""
        ...

    def prompt(self, example: SliceExample) -> NDArray[Any] | None:
        """What the site provides of an example's patient for a network, (tokens, dimension)."""
        ...

    def fingerprint(self) -> str:
        """Sha256 (hex) over what training can see."""
        ...


AnIndex = TypeVar("AnIndex", bound=Index)


class Visits(Generic[AnIndex]):
    """Visits of the members' test patients to another site's scanner: all of them test, nobody else is there.

    `members` are the indices of the patients' own sites, with the splits of those sites, so that no patient who trains
    or validates anywhere is ever among them. Patients are numbered anew, member after member.
    """

    def __init__(self, site: str, members: Sequence[AnIndex]) -> None:
        self.site = site
        self._homes = [(member, patient) for member in members for patient in member.patients("test")]
        self._members = tuple(members)

    def name(self, patient: int) -> str:
        """Return the patient's own site and the name of the folder there: it stays at the site."""
        member, own = self._homes[patient]
        return f"{member.site}/{member.name(own)}"

    def patients(self, split: SplitName) -> tuple[int, ...]:
        """Return the numbers of the patients of a split: all in `test`."""
        return tuple(range(len(self._homes))) if split == "test" else ()

    def examples(self, split: SplitName, slices: Slices | None = None) -> tuple[SliceExample, ...]:
        """Return the members' test examples, numbered by visit."""
        if split != "test":
            return ()
        numbers = {(id(member), patient): number for number, (member, patient) in enumerate(self._homes)}
        return tuple(
            replace(example, patient=numbers[id(member), example.patient])
            for member in self._members
            for example in member.examples("test", slices)
        )

    def image(self, example: SliceExample) -> NDArray[Any]:
        """Return the member's image."""
        member, own = self._at_home(example)
        return member.image(own)

    def mask(self, example: SliceExample) -> NDArray[Any]:
        """Return the member's mask."""
        member, own = self._at_home(example)
        return member.mask(own)

    def turn(self, example: SliceExample) -> Turn | None:
        """Return how the member's slice is shown."""
        member, own = self._at_home(example)
        return member.turn(own)

    def prompt(self, example: SliceExample) -> NDArray[Any] | None:
        """Return what the member provides of the patient."""
        member, own = self._at_home(example)
        return member.prompt(own)

    def fingerprint(self) -> str:
        """Return a sha256 (hex) over the members' fingerprints."""
        return hashlib.sha256("+".join(member.fingerprint() for member in self._members).encode()).hexdigest()

    def _at_home(self, example: SliceExample) -> tuple[AnIndex, SliceExample]:
        member, patient = self._homes[example.patient]
        return member, replace(example, patient=patient)

"""FedDG: sites see their images with low-frequency amplitudes of others, as scanners elsewhere would show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.apart import APART, Apart
from wardround.learning.methods.method import Array, Episode, Facts, LocalRound
from wardround.study.methods import AMPLITUDE_BANK, UNKNOWN_AMPLITUDE, Spectrum, WeightedSettings
from wardround.wire.random import public_generator
from wardround.wire.tensors import joined

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wardround.models.spectrum import AmplitudeBank
    from wardround.study.schema import Study

_SPECTRA, _FILLED = f"{AMPLITUDE_BANK}.spectra", f"{AMPLITUDE_BANK}.filled"
# Of a patient, examples that its amplitudes are the mean of.
EXAMPLES = 8


@dataclass(frozen=True)
class FedDG(Apart):
    """Episodic learning in continuous frequency space (Liu et al., CVPR 2021) without its boundary term.

    Once, each site gives a bank of low-frequency amplitudes A_n of its training images. In a step, every image of a
    batch x gets an amplitude of another site in place of its own, A' = (1 - lambda) A + lambda A_n with lambda drawn
    from U(0, 1) for each image, and keeps its phase: x'. The step lowers L(x; w) + L(x'; w'), where w' is one step of
    size `rate` from w on L(x; w) (`wardround.learning.episodes`, first order as in the authors' code).

    The paper's bank holds the amplitudes of single images. Here each of them is the mean over several patients, none
    of whom is in two, and a site with too few gives none. The paper's boundary term needs embeddings of single voxels,
    which most of our networks do not have: it is left out.

    A hospital that did not train gets the averaged network, which needs no bank; the released file holds none.
    """

    rate: float = 1e-3
    apart: ClassVar[tuple[str, ...]] = (_SPECTRA, _FILLED)
    # The values that a step is taken from, while its second loss is looked at.
    holds = 1

    @property
    def discloses(self) -> str:
        """The bank, and to whom."""
        return (
            "once, low-frequency amplitudes of its training images (method.kind: feddg), each the mean of at least two "
            "of its patients, and of egress.minimum_cohort: all sites and the coordinator read them, "
            "protection.secure or not"
        )

    def within(self, study: Study, sites: int, model: nn.Module) -> FedDG:
        """Raises `StudyError` for a network without a bank."""
        if not hasattr(model, AMPLITUDE_BANK):
            raise StudyError("method.kind=feddg: the task's network has no bank of amplitudes of the images it sees")
        return self

    def group_weights(self, facts: Facts, groups: tuple[str, ...]) -> dict[str, float]:
        """Every bank counts once, whatever its site weighs: how its share of the sum compares would tell its size."""
        return {name: 1.0 if name == APART else weight for name, weight in super().group_weights(facts, groups).items()}

    def begin(self, local: LocalRound) -> None:
        """Fill the site's places where no site's are filled yet: in the first round that comes to something.

        Raises `StudyError` where no site filled any in the round before, and this one has too few patients as well.
        """
        bank, survey = _bank(local), local.survey
        if survey is None or _made(local):
            return
        import torch

        cohorts = survey.cohorts(bank.each)
        if not cohorts and local.number > 1:
            raise StudyError(
                "method.kind=feddg: no site has enough training patients to give an amplitude (two at least, and "
                "egress.minimum_cohort); choose another method"
            )
        with torch.no_grad():
            for place, cohort in zip(bank.slots_of(local.site), cohorts, strict=False):
                images = (survey.images_of(own[:EXAMPLES]).to(bank.spectra) for own in cohort)
                patients = [bank.amplitudes(each).mean(0) for each in images]
                bank.spectra[place] = UNKNOWN_AMPLITUDE + torch.stack(patients).mean(0)
                bank.filled[place] = 1.0

    def episode(self, local: LocalRound) -> Episode | None:
        """The second loss of a step; none in the round in which the bank is made, and where no other site gave any."""
        if not _made(local):
            return None
        others = _bank(local).given_by_others(local.site)
        return Episode(self.rate, lambda batch, start: _changed(local, others, batch, start)) if len(others) else None

    def release_for(
        self, site: str | None, public: Mapping[str, Array], private: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """The network; to sites that train with the bank, to all others with an empty one."""
        released = super().release_for(site, public, private)
        if site is not None:
            return released
        return joined(released, {name: _empty(name, released[name]) for name in self.apart if name in released})


def _empty(name: str, found: Array) -> Array:
    return np.full_like(found, UNKNOWN_AMPLITUDE if name == _SPECTRA else 0.0)


def _bank(local: LocalRound) -> AmplitudeBank:
    # A study whose task has no bank was refused (`study.rules.check_spectrum`).
    bank: AmplitudeBank = getattr(local.model, AMPLITUDE_BANK)
    return bank


def _made(local: LocalRound) -> bool:
    """Whether any site has filled its places."""
    return bool(local.anchor[_FILLED].any())


def _changed(local: LocalRound, others: Tensor, batch: Any, start: int) -> Any:
    """The piece of a batch that begins at `start`, each image's amplitudes moved towards one of the others."""
    import torch

    count = len(batch.images)
    random = public_generator(local.seed, local.site, local.number, local.step, AMPLITUDE_BANK)
    # An image's numbers go by its place in the batch, in whichever pieces that comes.
    which, how_far = random.random((start + count, 2))[start:].T
    chosen = torch.from_numpy((which * len(others)).astype(int)).to(others.device)
    share = torch.from_numpy(how_far.astype("f4")).to(others.device)
    return replace(batch, images=_bank(local).swapped(batch.images.to(others), others[chosen], share))


class FedDGSettings(WeightedSettings):
    """Sites train on their images as other sites' scanners would show them (FedDG-ELCFS, Liu et al., 2021).

    Segmentation and classification; a bank of amplitudes is a side channel.
    """

    kind: Literal["feddg"]
    rate: float = Field(1e-3, gt=0.0, description="size of the inner step of an episode")
    spectra: int = Field(
        4, ge=1, description="amplitudes that a site gives at most, each the mean over other patients of it"
    )
    window: float = Field(
        0.003,
        gt=0.0,
        le=0.5,
        description="which frequencies are swapped: up to this share of the smallest side, and at least up to 1 cycle "
        "an image along each axis",
    )

    @property
    def spectrum(self) -> Spectrum:
        """A bank."""
        return Spectrum(bank=self.spectra, window=self.window)

    def build(self, protocols: Mapping[str, Any]) -> FedDG:
        """The method."""
        return FedDG(self.weights, rate=self.rate)

    def describe(self) -> str:
        """With how much is swapped."""
        return f"{self.kind}, window {self.window:g}, {self.spectra} amplitudes a site, inner rate {self.rate:g}"

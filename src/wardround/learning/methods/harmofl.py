"""HarmoFL: sites end where minima are flat, so that the mean of their models lies in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.apart import Apart
from wardround.learning.methods.method import LocalRound
from wardround.study.methods import AMPLITUDE, AveragingSettings, Spectrum

if TYPE_CHECKING:
    from torch import nn

    from wardround.study.schema import Study


@dataclass(frozen=True)
class HarmoFL(Apart):
    """Weight perturbation (Jiang et al., AAAI 2022, equation 6): a step follows the gradient at w + alpha g / |g|.

    g is the gradient of the same batch at w, over all that learns at the site; the step is taken from w. A step costs
    two. A hospital that did not train gets the same model.

    With `amplitude`, the network sees every image x as F^-1(A exp(i angle F(x))) (section 3.1; the class
    `wardround.models.spectrum.Amplitude`). A is the mean of the sites' mean amplitudes, with the method's weights: each
    site gives the running mean over the batches of its first round, once, in the first round that comes to something,
    in which it trains with its own; then A never changes. It is part of the released model, so a hospital that did not
    train sees its images alike, as does a clinic. Unlike the paper's, the running mean of a site is complete before its
    first step, and begins as the plain mean: of few batches, the first one would be most of it.
    """

    # The values that a step is taken from, while it looks further.
    holds = 1
    alpha: float = 0.05
    amplitude: bool = False
    momentum: float = 0.1
    apart: ClassVar[tuple[str, ...]] = (f"{AMPLITUDE}.mean",)

    @property
    def discloses(self) -> str:
        """The mean amplitude."""
        if not self.amplitude:
            return ""
        return (
            "once, the mean amplitude of the spectra of its training images (method.amplitude), of at least two "
            "patients and of egress.minimum_cohort, in the sum of the first round; the mean over sites is in the model"
        )

    def within(self, study: Study, sites: int, model: nn.Module) -> HarmoFL:
        """Raises `StudyError` for a network without an amplitude, where the method needs one."""
        if self.amplitude and not hasattr(model, AMPLITUDE):
            raise StudyError("method.amplitude: the task's network has no amplitude of the images that it sees")
        return self

    def begin(self, local: LocalRound) -> None:
        """Measure the site's amplitude where the global model has none yet.

        Raises `Withheld` where it would be of too few patients.
        """
        if not self.amplitude or local.survey is None:
            return
        from wardround.models.spectrum import Amplitude, is_known

        part = getattr(local.model, AMPLITUDE)
        assert isinstance(part, Amplitude)
        if bool(is_known(part.mean)):
            return
        local.survey.check_spread(
            running_weights(len(local.survey.order), self.momentum),
            "its mean amplitude (method.amplitude)",
            "raise local.steps or local.batch, give the site more training patients, or leave method.amplitude out",
        )
        part.take(Amplitude.running((images.to(part.mean) for images in local.survey.batches()), self.momentum))

    @property
    def tells(self) -> bool:
        """Where there is an amplitude."""
        return self.amplitude

    @property
    def flat_step(self) -> float:
        """How far a step looks."""
        return self.alpha


def running_weights(batches: int, momentum: float) -> tuple[float, ...]:
    """What each batch counts in the running mean of `Amplitude.running`; their sum is 1."""
    weights: tuple[float, ...] = ()
    for number in range(1, batches + 1):
        share = max(momentum, 1.0 / number)
        weights = (*((1.0 - share) * weight for weight in weights), share)
    return weights


class HarmoFLSettings(AveragingSettings):
    """Steps that end where minima are flat, each at the price of two (Jiang et al., 2022)."""

    kind: Literal["harmofl"]
    weights: Literal["samples", "equal", "validation"] = Field(
        "equal", description="`validation` is exp(-validation loss), clamped"
    )
    alpha: float = Field(0.05, gt=0.0, description="how far along its gradient a step looks, over all that learns")
    amplitude: bool = Field(
        False,
        description="whether the network sees all images with one amplitude of their spectra, the mean of the sites' "
        "(segmentation, classification): a side channel of the first round",
    )
    momentum: float = Field(0.1, gt=0.0, lt=1.0, description="of a batch in a site's running mean amplitude")

    @property
    def spectrum(self) -> Spectrum | None:
        """One amplitude, if it is asked for."""
        return Spectrum(mean=True) if self.amplitude else None

    def build(self, protocols: Mapping[str, Any]) -> HarmoFL:
        """The method."""
        return HarmoFL(
            self.weights,
            alpha=self.alpha,
            amplitude=self.amplitude,
            momentum=self.momentum,
            own_norm=self.unseen_norm == "own",
        )

    def describe(self) -> str:
        """With how far it looks."""
        return f"{self.kind}, alpha {self.alpha:g}" + (", one amplitude for all images" if self.amplitude else "")

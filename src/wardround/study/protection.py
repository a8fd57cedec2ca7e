"""What happens to an update between a site and the sum."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from wardround.errors import StudyError
from wardround.study.base import Config

Gradients: TypeAlias = Literal["opacus", "exact"]
Preset: TypeAlias = Literal["reconstruction-guard", "moderate", "strict"]
# Budget, and the noise where it is fixed. Little noise already keeps images from being read out of updates (Ziller et
# al., Nature Machine Intelligence 2024); that is no small epsilon, and nobody is told that it is.
_PRESETS: dict[str, tuple[float, float | None]] = {
    "reconstruction-guard": (1000.0, 0.3),
    "moderate": (8.0, None),
    "strict": (3.0, None),
}


class Privacy(Config):
    """Differential privacy with the patient as the unit: each site clips and adds noise before anything leaves."""

    preset: Preset = Field(
        "moderate",
        description="`reconstruction-guard`: little noise against reading images out of updates, and an epsilon in the "
        "hundreds, which says nothing against other attacks; `moderate`: epsilon 8; `strict`: epsilon 3",
    )
    epsilon: float | None = Field(None, gt=0.0, description="a site stops before it has spent more; default: preset")
    delta: float | None = Field(
        None, gt=0.0, lt=1.0, description="below 1 / training patients; default: 1 / (10 training patients)"
    )
    clip: float = Field(1.0, gt=0.0, description="largest norm of what one patient contributes to a step")
    noise_multiplier: float | None = Field(
        None,
        ge=0.05,
        description="noise over `clip`; default: preset, or the least with which all rounds of all arms fit `epsilon`",
    )
    patients_per_step: float = Field(
        8.0, gt=0.0, description="expected patients in a step: each is drawn independently (Poisson)"
    )
    examples_per_patient: int = Field(2, ge=1, description="the most examples of one patient in a step")
    noise: Literal["site", "distributed"] = Field(
        "site",
        description="`site`: each site's noise is enough by itself; `distributed`: only that of the sum is, with "
        "`secure` and one step a round",
    )
    gradients: Gradients = Field(
        "exact",
        description="of each patient: `exact` by autograd, one patient at a time, or `opacus`, all patients at once",
    )
    accountant: Literal["pld", "prv"] = Field("pld", description="dp-accounting, or the one of Opacus")

    @property
    def budget(self) -> float:
        """The epsilon before which a site stops."""
        return self.epsilon if self.epsilon is not None else _PRESETS[self.preset][0]

    @property
    def fixed_noise(self) -> float | None:
        """The noise multiplier where study or preset fix it."""
        if self.noise_multiplier is None and self.epsilon is None:
            return _PRESETS[self.preset][1]
        return self.noise_multiplier


class NoCompression(Config):
    """Every value of the change is sent."""

    kind: Literal["none"] = "none"


class Rotation(Config):
    """A seeded random rotation of every tensor; for `ring_bits` 16 and 24 (Suresh et al., 2017)."""

    kind: Literal["rotation"]


class Subspace(Config):
    """A random part of the rotated change, new every round; what is not sent stays at the site for the next one."""

    kind: Literal["subspace"]
    ratio: float = Field(0.1, gt=0.0, le=1.0, description="part of each tensor's values that is sent")


class TopK(Config):
    """The largest values of the change; what is not sent stays at the site. Not with `secure`."""

    kind: Literal["top_k"]
    ratio: float = Field(0.01, gt=0.0, le=0.25, description="part of each tensor's values that is sent")


Compression = Annotated[NoCompression | Rotation | Subspace | TopK, Field(discriminator="kind")]


class Robust(Config):
    """An aggregate that a minority of sites cannot move far, whatever they send; every site weighs the same in it."""

    rule: Literal["trimmed_mean", "median", "geometric_median", "krum", "multi_krum", "dnc", "centred_clipping"] = (
        "centred_clipping"
    )
    malicious: float = Field(
        0.2, gt=0.0, lt=0.5, description="share of the training sites that may be malicious, rounded down, at least one"
    )
    mixing: Literal["nearest_neighbour", "none"] = Field(
        "none", description="average each update with its nearest ones first; leaves unusual honest sites less weight"
    )
    gate: bool = Field(True, description="leave out updates that are several times as long as the median one")
    momentum: float = Field(
        0.9, ge=0.0, lt=1.0, description="a site sends its changes averaged over rounds; 0 sends each as it is"
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.rule == "dnc" and not self.gate:
            raise ValueError(
                "rule dnc needs gate: true; one update far away hides another at the mean, which dnc then keeps"
            )
        return self

    def tolerated(self, sites: int) -> int:
        """How many of so many sites may be malicious; raises `StudyError` when the rule is not defined for them."""
        count = max(1, math.floor(self.malicious * sites + 1e-9))
        least = 2 * count + (3 if self.rule in ("krum", "multi_krum") else 1)
        if sites < least:
            raise StudyError(
                f"protection.robust with rule {self.rule} stands {count} malicious among at least {least} training "
                f"sites, not {sites}"
            )
        return count


class Protection(Config):
    """Ring, compression, secure sum, robust mean and differential privacy of a study."""

    ring_bits: Literal[16, 24, 32] = 32
    max_sites: int = Field(64, ge=1, le=4096, description="sites the sum leaves room for")
    max_weight: float = Field(
        4096.0, gt=0.0, description="largest weight a site may claim, in training examples; use it up for precision"
    )
    compression: Compression = NoCompression()
    initial_scale: float = Field(0.2, gt=0.0, description="largest change of a parameter expected in round 1")
    secure: bool = Field(False, description="the coordinator learns the sum of the updates and nothing of any site")
    threshold: int | None = Field(
        None, ge=2, description="sites that must stay to the end of a secure sum; default: two thirds of them and one"
    )
    honest_but_curious: bool = Field(
        False, description="allow a threshold that is safe only while the coordinator follows the protocol"
    )
    robust: Robust | None = Field(None, description="stand malicious or broken sites; excludes `secure`")
    privacy: Privacy | None = Field(None, description="differential privacy for patients; `null` is none")

    def threshold_for(self, sites: int) -> int:
        """Sites that must stay to the end of a secure sum of so many; raises `StudyError` for an unsafe one.

        Above two thirds, any two groups of so many share an honest site even when a third of all collude with the
        coordinator; above one half, they share one where nobody does.
        """
        if sites < 3:
            raise StudyError(
                f"protection.secure needs at least 3 training sites, not {sites}: in a sum of two, each site reads the "
                "other's update"
            )
        safe, least = 2 * sites // 3 + 1, sites // 2 + 1
        wanted = self.threshold or (least if self.honest_but_curious else safe)
        lowest = least if self.honest_but_curious else safe
        if not lowest <= wanted <= sites:
            way = "" if self.honest_but_curious else " (protection.honest_but_curious: true allows less)"
            raise StudyError(
                f"protection.threshold={wanted} for {sites} training sites: choose {lowest} to {sites}{way}"
            )
        return wanted

    @model_validator(mode="after")
    def _compression_fits(self) -> Protection:
        if self.secure and isinstance(self.compression, TopK):
            raise ValueError(
                "`compression.kind: top_k` cannot be summed under masks, as every site sends other places; use "
                "`subspace`, or `secure: false`"
            )
        return self

    @model_validator(mode="after")
    def _robust_sees_updates(self) -> Protection:
        if self.secure and self.robust is not None:
            raise ValueError(
                "`robust` has to look at every site's update and `secure` hides them: choose one of the two"
            )
        if self.robust is not None and not isinstance(self.compression, NoCompression):
            raise ValueError("`robust` compares whole updates: it goes with `compression: {kind: none}` only")
        return self

    @model_validator(mode="after")
    def _noise_stays_hidden(self) -> Protection:
        if self.privacy is None or self.privacy.noise == "site":
            return self
        if not self.secure:
            raise ValueError(
                "`privacy.noise: distributed` gives each site too little noise to be seen alone: set `secure: true`"
            )
        if not isinstance(self.compression, NoCompression):
            raise ValueError("`privacy.noise: distributed` has a rotation of its own: set `compression: {kind: none}`")
        if self.privacy.delta is None:
            raise ValueError("`privacy.noise: distributed` is sized for all sites alike: give `privacy.delta`")
        return self

    @model_validator(mode="after")
    def _only_with_secure(self) -> Protection:
        if not self.secure and (self.threshold is not None or self.honest_but_curious):
            raise ValueError("`threshold` and `honest_but_curious` mean something with `secure: true` only")
        return self

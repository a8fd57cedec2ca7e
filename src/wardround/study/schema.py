"""The study file: everything that decides a result, with its defaults.

Where a site's data lie is never in it: the sites file (`wardround.study.sites`) says that.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from wardround.errors import StudyError
from wardround.study.acquisition import MRIAcquisition
from wardround.study.base import Config

SiteName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")]
# Names of arms, of aggregates in result.json and of the pooled site.
RESERVED_NAMES = frozenset({"mean", "unseen", "pooled", "local", "federated", "baseline", "coordinator"})


class Site(Config):
    """A hospital: its role and its scanner's protocol."""

    role: Literal["train", "unseen"] = Field("train", description="`unseen` sites are evaluated only")
    acquisition: MRIAcquisition | None = Field(None, description="overrides the study's acquisition")


class Slices(Config):
    """Which slices of a volume are examples."""

    every: int = Field(1, ge=1, description="take every n-th slice")
    minimum_foreground: float = Field(0.05, ge=0.0, lt=1.0, description="skip slices with less tissue than this")
    per_patient: int | None = Field(None, ge=1, description="at most so many, evenly spread")


class Split(Config):
    """Shares of a site's patients for validation and test; the rest trains. Drawn from the seed, by patient."""

    validation: float = Field(0.15, ge=0.0, lt=1.0)
    test: float = Field(0.2, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _someone_trains(self) -> Split:
        if self.validation + self.test >= 1.0:
            raise ValueError("`validation` and `test` leave no patient to train on; their sum must stay below 1")
        return self


class Loss(Config):
    """The training loss, on magnitude images scaled to the range of the acquisition."""

    kind: Literal["l1", "mse", "ssim", "l1_ssim"] = "l1"
    masked: bool = Field(False, description="inside the head mask only")


class Evaluation(Config):
    """What is measured on test patients."""

    baselines: tuple[Literal["zero_filled", "cg_sense", "tv"], ...] = ("zero_filled", "cg_sense", "tv")
    tv_weights: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.004, 0.008)
    cg_weights: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    slices: Slices = Slices(per_patient=8)
    tuning_slices: int = Field(2, ge=1, description="slices per validation patient used to tune a baseline")
    bootstrap: int = Field(200, ge=0, le=10_000, description="patient-level bootstrap replicates")
    leave_one_out: bool = Field(False, description="train once without each training site for the `unseen` figures")


class ReconstructionTask(Config):
    """From undersampled raw data to an image."""

    kind: Literal["reconstruction"] = "reconstruction"
    contrasts: tuple[str, ...] = Field(("image",), min_length=1)
    size: tuple[int, int] = (128, 128)
    slices: Slices = Slices()
    split: Split = Split()
    flips: bool = Field(True, description="random left-right flips of training examples")
    loss: Loss = Loss()
    evaluation: Evaluation = Evaluation()


class CustomTask(Config):
    """Your own task: `factory` is `package.module:callable`, called with `options`, returning a `Task`."""

    kind: Literal["custom"]
    factory: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    options: dict[str, Any] = Field(default_factory=dict)


class MoDL(Config):
    """Unrolled reconstruction with conjugate-gradient data consistency (Aggarwal et al., IEEE TMI 2019)."""

    kind: Literal["modl"] = "modl"
    preset: Literal["tiny", "small", "paper"] = "small"
    unrolls: int | None = Field(None, ge=1, le=50)
    cg_iterations: int | None = Field(None, ge=1, le=100)
    channels: int | None = Field(None, ge=1, le=1024)
    layers: int | None = Field(None, ge=2, le=50)
    scale: Literal[1, 2, 4] | None = Field(None, description="the denoiser sees images so many times smaller")
    norm: Literal["none", "batch", "instance"] | None = None
    image: Literal["complex", "real"] | None = Field(
        None, description="`real` constrains the phase to that of the estimated coil maps"
    )


class UNet(Config):
    """Post-processing U-Net on the zero-filled image (MONAI's BasicUNet)."""

    kind: Literal["unet"]
    preset: Literal["tiny", "small", "paper"] = "small"
    norm: Literal["none", "batch", "instance"] | None = None


Model = Annotated[MoDL | UNet, Field(discriminator="kind")]


class _Weighted(Config):
    weights: Literal["samples", "equal", "validation"] = Field(
        "samples", description="`validation` is exp(-validation loss), clamped"
    )


class FedAvg(_Weighted):
    """Weighted averaging (McMahan et al., 2017)."""

    kind: Literal["fedavg"] = "fedavg"


class FedProx(_Weighted):
    """A proximal term keeps sites near the global model (Li et al., 2020)."""

    kind: Literal["fedprox"]
    mu: float = Field(0.01, ge=0.0)


class FedBN(_Weighted):
    """Batch-norm layers stay at the site (Li et al., 2021)."""

    kind: Literal["fedbn"]


class FedAvgM(_Weighted):
    """Server momentum (Hsu et al., 2019)."""

    kind: Literal["fedavgm"]
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    server_lr: float = Field(1.0, gt=0.0)


class FedAdam(_Weighted):
    """Adam at the server (Reddi et al., 2021)."""

    kind: Literal["fedadam"]
    server_lr: float = Field(0.001, gt=0.0)
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.99, ge=0.0, lt=1.0)
    tau: float = Field(1e-3, gt=0.0)


class CustomMethod(Config):
    """Your own method: an entry point of the group `wardround.methods`, or `package.module:callable`."""

    kind: Literal["custom"]
    factory: str
    options: dict[str, Any] = Field(default_factory=dict)


Method = Annotated[FedAvg | FedProx | FedBN | FedAvgM | FedAdam | CustomMethod, Field(discriminator="kind")]


class Local(Config):
    """What a site does in one round."""

    steps: int = Field(20, ge=1, description="optimiser steps in a round")
    batch: int = Field(1, ge=1, description="examples in a step")
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = Field(1e-3, gt=0.0)
    schedule: Literal["constant", "cosine"] = Field("constant", description="over all rounds, by global step")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up, by global step")
    weight_decay: float = Field(0.0, ge=0.0)
    momentum: float = Field(0.0, ge=0.0, lt=1.0, description="SGD only")
    clip_norm: float | None = Field(None, gt=0.0, description="clip each step's gradient to this norm")
    optimizer_state: Literal["reset", "keep"] = "reset"
    threads: int = Field(1, ge=1, description="torch threads of a site")


class Schedule(Config):
    """How long, with whom, and which round is released."""

    rounds: int = Field(20, ge=1)
    min_sites: int = Field(1, ge=1, description="fewer sites than this in a round stop the run")
    validate_every: int = Field(1, ge=0, description="rounds between validations; 0 is never")
    release: Literal["best", "last"] = Field("best", description="best summed validation metric, or the last round")
    keep: int = Field(2, ge=1, description="rounds whose global model the journal keeps, besides the best")


class Protection(Config):
    """The ring in which updates are summed, and whether the coordinator sees more than the sum."""

    ring_bits: Literal[16, 24, 32] = 32
    max_sites: int = Field(64, ge=1, le=4096, description="sites the sum leaves room for")
    max_weight: float = Field(
        4096.0, gt=0.0, description="largest weight a site may claim, in training examples; use it up for precision"
    )
    initial_scale: float = Field(0.2, gt=0.0, description="largest change of a parameter expected in round 1")
    secure: bool = Field(False, description="the coordinator learns the sum of the updates and nothing of any site")
    threshold: int | None = Field(
        None, ge=2, description="sites that must stay to the end of a secure sum; default: two thirds of them and one"
    )
    honest_but_curious: bool = Field(
        False, description="allow a threshold that is safe only while the coordinator follows the protocol"
    )

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
    def _only_with_secure(self) -> Protection:
        if not self.secure and (self.threshold is not None or self.honest_but_curious):
            raise ValueError("`threshold` and `honest_but_curious` mean something with `secure: true` only")
        return self


class Study(Config):
    """A study: everything that decides its result."""

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**63)
    sites: dict[SiteName, Site] = Field(min_length=1)
    acquisition: MRIAcquisition = MRIAcquisition()
    task: Annotated[ReconstructionTask | CustomTask, Field(discriminator="kind")] = ReconstructionTask()
    model: Model = MoDL()
    method: Method = FedAvg()
    local: Local = Local()
    schedule: Schedule = Schedule()
    protection: Protection = Protection()

    @field_validator("sites")
    @classmethod
    def _names_are_free(cls, sites: dict[str, Site]) -> dict[str, Site]:
        taken = sorted(RESERVED_NAMES & sites.keys())
        if taken:
            raise ValueError(f"{taken[0]!r} is a reserved name; call the site something else")
        return sites

    @model_validator(mode="after")
    def _sites_fit(self) -> Study:
        training = self.training_sites
        if not training:
            raise ValueError("no site has `role: train`")
        if self.schedule.min_sites > len(training):
            raise ValueError(
                f"schedule.min_sites={self.schedule.min_sites} but only {len(training)} sites train; lower it"
            )
        if len(training) > self.protection.max_sites:
            raise ValueError(
                f"{len(training)} training sites but protection.max_sites={self.protection.max_sites}; raise it"
            )
        if self.protection.secure:
            try:
                self.protection.threshold_for(len(training))
            except StudyError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def training_sites(self) -> tuple[str, ...]:
        """Names of the sites that train, in the order of the file."""
        return tuple(name for name, site in self.sites.items() if site.role == "train")

    @property
    def unseen_sites(self) -> tuple[str, ...]:
        """Names of the sites that are evaluated only."""
        return tuple(name for name, site in self.sites.items() if site.role == "unseen")

    def acquisition_of(self, site: str) -> MRIAcquisition:
        """The protocol of a site: its own, or the study's."""
        return self.sites[site].acquisition or self.acquisition

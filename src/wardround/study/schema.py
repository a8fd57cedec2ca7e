"""The study file: everything that decides a result, with its defaults.

Where a site's data lie is never in it: the sites file (`wardround.study.sites`) says that.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from wardround.errors import StudyError
from wardround.study.acquisition import MRIAcquisition
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.adapters import Adapters, NoAdapters
from wardround.study.asynchronous import Asynchronous, check_asynchronous
from wardround.study.base import Config, Settings
from wardround.study.forget import Forget
from wardround.study.methods import MethodSettings
from wardround.study.models import ModelSettings
from wardround.study.phases import Phase, check_phases
from wardround.study.places import OwnFiles, Places, given, release_in
from wardround.study.protection import Protection
from wardround.study.registry import (
    BASELINES,
    EVERY,
    STRICT,
    Reading,
    Section,
    baseline,
    check_baseline,
    check_modality,
    check_model,
    default,
    installed_baselines,
    read,
)
from wardround.study.retention import check_fisher, check_retention, taught_by_release
from wardround.study.rules import (
    check_evaluating_sites,
    check_forgetting,
    check_given,
    check_missing,
    check_privacy,
    check_spectrum,
    check_update,
)
from wardround.study.start import Fresh, FromAdapter, FromRelease, FromWeights, Parts, Start
from wardround.study.supervision import Supervision, check_supervision
from wardround.study.tasks import Modality, ReconstructionTask, TaskSettings
from wardround.study.teacher import TaughtBy
from wardround.study.update import PARENT, Distilled, Elastic, FisherFile, Update

# Letters and digits of any script, in one of the ways to write them: the study's and the sites file's must be equal.
SiteName = Annotated[
    str,
    Field(pattern=r"^\p{L}[\p{L}\p{M}\p{N}_-]{0,31}$"),
    BeforeValidator(lambda name: unicodedata.normalize("NFC", name) if isinstance(name, str) else name),
]
# Names of arms, of aggregates in result.json and of the pooled site.
RESERVED_NAMES = frozenset({"mean", "unseen", "pooled", "local", "federated", "baseline", "coordinator"})


# A section without a kind means MRI: a study from before there were two says nothing.
Acquisition = Annotated[
    SerializeAsAny[AcquisitionSettings], BeforeValidator(lambda value, info: read("acquisition", value, info))
]


class StudySite(Config):
    """A hospital: its role and its scanner's protocol."""

    role: Literal["train", "evaluate", "unseen"] = Field(
        "train",
        description="`train`: trains, validates and is tested; `evaluate`: does not train, but its validation patients "
        "count in every validated round, so in the choice of the released one, and it is tested at the end; `unseen`: "
        "is tested at the end alone. Where nothing is trained (`schedule.rounds: 0`), `train` and `evaluate` say whose "
        "validation patients choose thresholds and temperature, and `unseen` that all of a site's patients test",
    )
    acquisition: Acquisition | None = Field(None, description="overrides the study's acquisition")
    supervision: Supervision | None = Field(
        None, description="reconstruction only: overrides `task.supervision`, for a site without true images, say"
    )
    scans: tuple[SiteName, ...] = Field(
        (),
        description="unseen sites only: instead of patients of its own, its scanner sees the test patients of these "
        "sites (on one machine; the sites file then has no entry for it)",
    )
    missing: tuple[str, ...] = Field(
        (),
        description="contrasts of `task.images`, as they stand there, that the site has of no patient: their files are "
        "not looked for and their channels are 0. Segmentation, classification and chains of MRI; see "
        "`task.drop_contrasts`",
    )
    returns: bool = Field(
        False,
        description="whether the site had left the model that the study starts from (`forget`) and is back; without it "
        "such a site is refused",
    )


class Local(Config):
    """What a site does in one round."""

    steps: int = Field(20, ge=1, description="optimiser steps in a round")
    passes: float | None = Field(
        None,
        gt=0.0,
        le=1000.0,
        description="in place of `steps`: passes over a site's own examples in a round, so that sites of more patients "
        "take more steps (method.kind fednova weighs for it)",
    )
    batch: int = Field(1, ge=1, description="examples in a step")
    accumulate: int = Field(
        1,
        ge=1,
        description="pieces of a batch that pass the network one after another, so that memory is that of one: the "
        "gradient is the sum of theirs, by their numbers of examples. Batch norm sees pieces",
    )
    checkpoint: bool = Field(
        False,
        description="whether blocks of the network forget what they compute and compute it again for the gradient: "
        "less memory for more time, and the same gradient (vit, mae_vit, transformers, lite_medsam, swin_unetr, modl, "
        "learn, lpd, varnet, e2e_varnet, swin_denoiser)",
    )
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = Field(1e-3, gt=0.0)
    schedule: Literal["constant", "cosine"] = Field("constant", description="over all rounds, by global step")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up, by global step")
    weight_decay: float = Field(0.0, ge=0.0)
    momentum: float = Field(0.0, ge=0.0, lt=1.0, description="SGD only")
    clip_norm: float | None = Field(None, gt=0.0, description="clip each step's gradient to this norm")
    optimizer_state: Literal["reset", "keep"] = "reset"

    @property
    def pieces(self) -> tuple[int, ...]:
        """Numbers of examples that pass the network at once, in a step; the largest first."""
        size, larger = divmod(self.batch, self.accumulate)
        return (size + 1,) * larger + (size,) * (self.accumulate - larger)

    def steps_of(self, examples: int) -> int:
        """Optimiser steps in a round of a party with a number of training examples.

        Passes end with a whole batch, for which the next pass begins.
        """
        if self.passes is None:
            return self.steps
        return max(1, math.ceil(self.passes * examples / self.batch - 1e-9))

    @model_validator(mode="after")
    def _steps_or_passes(self) -> Local:
        if self.passes is not None and "steps" in self.model_fields_set:
            raise ValueError("`steps` and `passes` both say how long a round is; leave one of them out")
        return self

    @model_validator(mode="after")
    def _no_empty_piece(self) -> Local:
        if self.accumulate > self.batch:
            raise ValueError(
                f"`accumulate`: a batch of {self.batch} has no {self.accumulate} pieces; set it to {self.batch} or less"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _no_threads(cls, value: Any, info: ValidationInfo) -> Any:
        if not (isinstance(value, Mapping) and "threads" in value):
            return value
        if isinstance(info.context, Reading) and info.context.foreign:
            # A model or a result of before says on how many threads its sites were; whoever reads it has others.
            return {key: given for key, given in value.items() if key != "threads"}
        raise ValueError(
            "`threads` is the machine's choice and no longer the study's: take the key out, and set "
            "`sites.NAME.threads` in the sites file"
        )


class Schedule(Config):
    """How long, with whom, and which round is released."""

    rounds: int = Field(
        20, ge=0, description="`0`: nothing is trained, and the model that `start` names is measured at every site"
    )
    min_sites: int = Field(1, ge=1, description="fewer sites than this in a round stop the run")
    validate_every: int = Field(1, ge=0, description="rounds between validations; 0 is never")
    release: Literal["best", "last"] = Field(
        "best",
        description="`best`: the best validation mean among the rounds that the same sites validated (those of most "
        "rounds, then most sites), or the last round where no two can be compared; `last`: the last round. With "
        "phases, `best` compares rounds of the last phase alone",
    )
    keep: int = Field(2, ge=1, description="rounds whose global model the journal keeps, besides the best")
    phases: tuple[Phase, ...] = Field(
        (),
        description="for a task of several stages: which of them learn in which rounds, and how their losses are "
        "weighted; without phases all learn in every round, each loss with weight 1",
    )

    asynchronous: Asynchronous | None = Field(
        None, description="rounds that do not wait for a slow site; without it a round waits for all sites"
    )

    @field_validator("phases")
    @classmethod
    def _phases_fit(cls, phases: tuple[Phase, ...], info: ValidationInfo) -> tuple[Phase, ...]:
        # Of no rounds there are no phases, which the study says itself (`check_given`).
        if info.data.get("rounds"):
            check_phases(phases, info.data["rounds"])
        return phases


class Study(Config):
    """A study: everything that decides its result."""

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**63)
    sites: dict[SiteName, StudySite] = Field(min_length=1)
    acquisition: Acquisition | None = Field(
        MRIAcquisition(),
        description="how sites scan that do not say it themselves; none for a task of images",
    )
    task: Annotated[SerializeAsAny[TaskSettings], BeforeValidator(lambda value, info: read("task", value, info))] = (
        Field(default_factory=lambda: default("task"))
    )
    model: Annotated[SerializeAsAny[ModelSettings], BeforeValidator(lambda value, info: read("model", value, info))] = (
        Field(default_factory=lambda: default("model"))
    )
    method: Annotated[
        SerializeAsAny[MethodSettings], BeforeValidator(lambda value, info: read("method", value, info))
    ] = Field(default_factory=lambda: default("method"))
    start: Start = Field(Fresh(), description="what the model begins with, in every arm")
    update: Update | None = Field(None, description="for a study that continues a release: what it must not lose")
    site_statistics: bool = Field(
        False,
        description="whether each site says before round 1 how its images look: sums of histograms, spectra, noise, "
        "resolution, outlines and classes over its training patients, which the coordinator reads (docs/shift.md); "
        "excludes `protection.privacy`",
    )
    forget: Forget | None = Field(
        None, description="for a study that makes a model without a hospital which left: who, and who approved of it"
    )
    parts: Parts = Parts()
    adapters: Adapters = Field(NoAdapters(), description="what of a large network is trained beside frozen layers")
    local: Local = Local()
    schedule: Schedule = Schedule()
    protection: Protection = Protection()

    @model_validator(mode="before")
    @classmethod
    def _sections_are_read(cls, value: Any) -> Any:
        """Sections that the file leaves out are read as the rest is: some readers import no model (`Reading`)."""
        return {**{section: {} for section in EVERY}, **value} if isinstance(value, Mapping) else value

    @field_validator("sites")
    @classmethod
    def _names_are_free(cls, sites: dict[str, StudySite]) -> dict[str, StudySite]:
        taken = sorted(RESERVED_NAMES & sites.keys())
        if taken:
            raise ValueError(f"{taken[0]!r} is a reserved name; call the site something else")
        return sites

    @model_validator(mode="after")
    def _has_the_scanners_of_its_task(self) -> Study:
        """A scanner where the task has one, and no default of one elsewhere."""
        own = [name for name, site in self.sites.items() if site.acquisition is not None]
        stated = "acquisition" in self.model_fields_set and self.acquisition is not None
        if self.task.scanner == "none" and (stated or own):
            key = "acquisition" if stated else f"sites.{own[0]}.acquisition"
            raise ValueError(f"{key}: task.kind {self.task.kind} begins with images and simulates no scan; take it out")
        if self.task.scanner == "needed" and self.acquisition is None:
            raise ValueError(f"acquisition: task.kind {self.task.kind} needs one")
        if self.task.scanner == "none" or (self.task.scanner == "optional" and not stated and not own):
            # What was written stays what it is: only the default goes.
            self.__dict__["acquisition"] = None
        return self

    @model_validator(mode="after")
    def _continues(self) -> Study:
        """What an `update` means for the other sections, before those are looked at."""
        if (taught := taught_by_release(self)) is not None:
            self.__dict__["task"] = taught
        check_retention(self)
        check_fisher(self)
        return self

    @model_validator(mode="after")
    def _sites_fit(self, info: ValidationInfo) -> Study:
        training = self.training_sites
        if not self.trains:
            check_given(self)
        elif not training:
            raise ValueError("no site has `role: train`")
        elif self.schedule.min_sites > len(training):
            raise ValueError(
                f"schedule.min_sites={self.schedule.min_sites} but only {len(training)} sites train; lower it"
            )
        if len(training) > self.protection.max_sites:
            raise ValueError(
                f"{len(training)} training sites but protection.max_sites={self.protection.max_sites}; raise it"
            )
        kinds = list(dict.fromkeys(self.acquisition_of(site).kind for site in self.sites)) if self.scans else []
        if len(kinds) > 1:
            raise ValueError(
                f"some sites are {kinds[0].upper()} and some are {kinds[1].upper()}; a study has one modality: give "
                "all the same `kind`"
            )
        reading = info.context if isinstance(info.context, Reading) else STRICT
        try:
            if isinstance(self.task, ReconstructionTask):
                self._task_fits(self.task)
            elif stating := [name for name, site in self.sites.items() if site.supervision is not None]:
                raise StudyError(f"sites.{stating[0]}.supervision: only for task.kind: reconstruction; remove it")
            if self.task.classical is not None:
                self._baselines_fit(self.task.classical.baselines or (), reading)
            check_model(self.model, self.task)
            if self.task.scanner == "needed" and not self.scanner.closed:
                check_modality(self.model, self.modality)
        except StudyError as error:
            raise ValueError(str(error)) from None
        for name, site in self.sites.items():
            wrong = [other for other in site.scans if other not in (training if self.trains else self.averaged_sites)]
            if site.scans and (site.role != "unseen" or wrong):
                lacks = "does not train" if self.trains else "has no patients of its own"
                raise ValueError(
                    f"sites.{name}.scans: " + (f"{wrong[0]!r} {lacks}" if wrong else "only for `role: unseen`")
                )
        check_evaluating_sites(self)
        check_missing(self)
        check_spectrum(self)
        check_forgetting(self)
        check_update(self)
        check_asynchronous(self)
        if self.protection.robust is not None:
            try:
                self.protection.robust.tolerated(len(training))
            except StudyError as error:
                raise ValueError(str(error)) from None
            if self.schedule.release == "best":
                raise ValueError(
                    "with protection.robust set `schedule: {release: last}`: a malicious site's validation would "
                    "choose the best round"
                )
        if self.protection.secure:
            try:
                self.protection.threshold_for(len(training))
            except StudyError as error:
                raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Study:
        """Refuse what the method has no answer to; of a plug-in's once its settings are known."""
        if self.trains and not self.method.closed:
            self.method.check(self)
        return self

    @model_validator(mode="after")
    def _privacy_holds(self) -> Study:
        """Refuse whatever would say something of a patient beside the noised gradients."""
        check_privacy(self)
        return self

    def _task_fits(self, task: ReconstructionTask) -> None:
        """Raises StudyError. What a plug-in says is looked at once its settings are known; without, nothing runs."""
        scanner = self.scanner
        if task.augment and not (scanner.augments or scanner.closed):
            raise StudyError("task.augment: only for CT; remove it")
        for site in self.sites:
            self.acquisition_of(site).check(task, site)
            check_supervision(self, self.acquisition_of(site), site)

    def _baselines_fit(self, named: tuple[str, ...], reading: Reading) -> None:
        """Raises StudyError for a classical method that is none, or not for what the sites' scanners measure."""
        scanner = self.scanner
        for name in named:
            if name in RESERVED_NAMES or name == PARENT:
                raise StudyError(f"task.evaluation.baselines: {name!r} is a reserved name")
            if name in BASELINES and not scanner.closed:
                check_baseline(name, baseline(name), self.modality)
            if name not in BASELINES and not reading.foreign and name not in (outside := installed_baselines()):
                known = ", ".join((*BASELINES, *sorted(outside)))
                raise StudyError(
                    f"task.evaluation.baselines: there is no baseline {name!r}; choose from {known}, or install the "
                    "package that has it and add its name to sites.NAME.plugins in the sites file"
                )

    def places(self, near: Path, entries: Sequence[OwnFiles] = ()) -> Places:
        """Where the files that the study names may lie, on a machine whose sites say where theirs do.

        `near` is the folder of the study's file, of which `start.file` and the like are paths.
        """
        start = self.start if isinstance(self.start, FromWeights | FromRelease) else None

        def below(
            named: FromWeights | FromRelease | FromAdapter | TaughtBy | FisherFile | None, others: tuple[Path, ...] = ()
        ) -> tuple[Path, ...]:
            return () if named is None else others or ((near / named.file).absolute(),)

        kept: tuple[Path, ...] = ()
        if isinstance(start, FromRelease) and start.sha256:
            kept = given(entry.history and release_in(entry.history, start.sha256) for entry in entries)
        retain = None if self.update is None else self.update.retain
        begun = (*below(start, given(entry.start for entry in entries)), *kept)
        taught = below(self.task.taught_by, given(entry.teacher for entry in entries))
        return Places(
            start=begun,
            adapter=below(start and start.adapter),
            # What is to be remembered is what the study starts from, wherever that lies.
            teacher=begun if isinstance(retain, Distilled) else taught,
            fisher=below(retain.fisher if isinstance(retain, Elastic) else None),
            stores=given(folder for entry in entries for folder in entry.weights),
        )

    @property
    def scans(self) -> bool:
        """Whether the study says how its sites scan."""
        return self.acquisition is not None

    @property
    def scanner(self) -> AcquisitionSettings:
        """The first site's acquisition: all sites' are of its kind. Raises `StudyError` where there are none."""
        return self.acquisition_of(next(iter(self.sites)))

    @property
    def modality(self) -> Modality:
        """What the study's acquisitions are of. Raises `StudyError` where there are none."""
        return self.scanner.modality

    @property
    def baselines(self) -> tuple[str, ...]:
        """The classical methods that the study compares with."""
        named = self.task.compares_with
        return self.scanner.baselines[: self.task.compared] if named is None else named

    @property
    def trains(self) -> bool:
        """Whether anything is trained; else the model that the study starts from is measured."""
        return self.schedule.rounds > 0

    @property
    def continues(self) -> str | None:
        """The release (`model_sha256`) that the study continues, with a section `update`; `None` for other studies."""
        return self.start.sha256 if self.update is not None and isinstance(self.start, FromRelease) else None

    @property
    def compared_rows(self) -> tuple[str, ...]:
        """The rows of the results that no arm trains: baselines, and the release that the study continues."""
        return self.baselines if self.update is None else (*self.baselines, PARENT)

    @property
    def training_sites(self) -> tuple[str, ...]:
        """Names of the sites that train, in the order of the file; none where nothing is trained."""
        return self.member_sites if self.trains else ()

    @property
    def member_sites(self) -> tuple[str, ...]:
        """Names of the sites of `role: train`, whom a model serves as its own; also where nothing is trained."""
        return tuple(name for name, site in self.sites.items() if site.role == "train")

    @property
    def averaged_sites(self) -> tuple[str, ...]:
        """Names of the sites that means are over: those that train; where none does, all with patients of their own."""
        if self.trains:
            return self.training_sites
        return tuple(name for name, site in self.sites.items() if not site.scans)

    @property
    def evaluating_sites(self) -> tuple[str, ...]:
        """Names of the sites of `role: evaluate`: they do not train, and their validation patients count."""
        return tuple(name for name, site in self.sites.items() if site.role == "evaluate")

    @property
    def unseen_sites(self) -> tuple[str, ...]:
        """Names of the sites that are only tested, after training."""
        return tuple(name for name, site in self.sites.items() if site.role == "unseen")

    def supervision_of(self, site: str) -> Supervision:
        """What a site learns from: its own, or the task's; true images in a task that does not say it."""
        own = self.sites[site].supervision
        return own or (self.task.supervision if isinstance(self.task, ReconstructionTask) else Supervision())

    def sections(self) -> Iterator[tuple[str, Section, Settings]]:
        """The sections whose kinds a package outside can add: where they stand, what they are, their settings."""
        yield from ((section, section, getattr(self, section)) for section in EVERY)
        if self.acquisition is not None:
            yield "acquisition", "acquisition", self.acquisition
        for name, site in self.sites.items():
            if site.acquisition is not None:
                yield f"sites.{name}.acquisition", "acquisition", site.acquisition

    def acquisition_of(self, site: str) -> AcquisitionSettings:
        """The protocol of a site: its own, or the study's. Raises `StudyError` where a study simulates no scan."""
        found = self.sites[site].acquisition or self.acquisition
        if found is None:
            raise StudyError(f"task.kind {self.task.kind} has no scanner")
        return found

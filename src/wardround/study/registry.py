"""The kinds of task, model, method and acquisition that a study can name, and baselines: each imported when named.

A kind is a settings class: it reads its section of the study, says in a line what it is, and builds what it describes;
a baseline is a `wardround.study.baselines.Baseline`. The package's own are listed here by their places; a package
outside has an entry point for each of its own, in the groups below, under the name that a study gives. Of those only
the names are read here; what may be imported, `wardround.study.plugins` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationInfo
from pydantic_core import PydanticCustomError

from wardround.errors import StudyError
from wardround.study.acquisitions import AcquisitionSettings, ClosedAcquisition
from wardround.study.base import Settings, at
from wardround.study.methods import ClosedMethod, MethodSettings
from wardround.study.models import ClosedModel, ModelSettings
from wardround.study.tasks import ClosedTask, Modality, TaskSettings

if TYPE_CHECKING:
    from wardround.study.baselines import Baseline

Section = Literal["task", "model", "method", "acquisition"]
# Those that every study has, whether its file says them or not.
EVERY: tuple[Section, ...] = ("task", "model", "method")
# The first of each is the one of a study that says nothing.
BUILTIN: Mapping[Section, Mapping[str, str]] = {
    "task": {
        "reconstruction": "wardround.study.tasks:ReconstructionTask",
        "segmentation": "wardround.tasks.segmentation:SegmentationTask",
        "chain": "wardround.tasks.chain:ChainTask",
        "classification": "wardround.tasks.classification:ClassificationTask",
        "prompted_segmentation": "wardround.tasks.prompted:PromptedTask",
        "chain_to_class": "wardround.tasks.chain_class:ChainToClassTask",
        "pretraining": "wardround.tasks.pretraining:PretrainingTask",
        "custom": "wardround.study.tasks:CustomTask",
    },
    "model": {
        "modl": "wardround.models.unrolled:MoDLSettings",
        "unet": "wardround.models.cnn:UNetSettings",
        "learn": "wardround.models.learn:LearnSettings",
        "redcnn": "wardround.models.redcnn:REDCNNSettings",
        "lpd": "wardround.models.lpd:LPDSettings",
        "two_band": "wardround.models.two_band:TwoBandSettings",
        "own_network": "wardround.study.own_network:OwnModel",
        "iradonmap": "wardround.models.iradonmap:IRadonMAPSettings",
        "monai_unet": "wardround.models.segmenters:MonaiUNetSettings",
        "segresnet": "wardround.models.segmenters:SegResNetSettings",
        "dynunet": "wardround.models.segmenters:DynUNetSettings",
        "densenet": "wardround.models.classifiers:DenseNetSettings",
        "resnet": "wardround.models.classifiers:ResNetSettings",
        "efficientnet": "wardround.models.classifiers:EfficientNetSettings",
        "efficientnet_lite": "wardround.models.efficientnet_lite:EfficientNetLiteSettings",
        "swin_unetr": "wardround.models.segmenters:SwinUNETRSettings",
        "lite_medsam": "wardround.models.lite_medsam:LiteMedSAMSettings",
        "vit": "wardround.models.vit:ViTSettings",
        "monai_bundle": "wardround.models.monai_bundle:MonaiBundleSettings",
        "transformers": "wardround.models.transformers_classifier:TransformersSettings",
        "mae_vit": "wardround.models.mae_vit:MaskedViTSettings",
        "cascade": "wardround.models.cascade:CascadeSettings",
        "varnet": "wardround.models.varnet:VarNetSettings",
        "e2e_varnet": "wardround.models.e2e_varnet:E2EVarNetSettings",
        "swin_denoiser": "wardround.models.swin_denoiser:SwinDenoiserSettings",
        "generative_prior": "wardround.models.generative_prior:GenerativePriorSettings",
    },
    "method": {
        "fedavg": "wardround.learning.methods.fedavg:FedAvgSettings",
        "fedprox": "wardround.learning.methods.fedprox:FedProxSettings",
        "fedbn": "wardround.learning.methods.fedbn:FedBNSettings",
        "hyperfed": "wardround.learning.methods.hyperfed:HyperFedSettings",
        "scan_physfed": "wardround.learning.methods.scan_physfed:ScanPhysFedSettings",
        "fedfdd": "wardround.learning.methods.fedfdd:FedFDDSettings",
        "fedct": "wardround.learning.methods.fedct:FedCTSettings",
        "fedavgm": "wardround.learning.methods.fedavgm:FedAvgMSettings",
        "fedadam": "wardround.learning.methods.fedadam:FedAdamSettings",
        "ditto": "wardround.learning.methods.ditto:DittoSettings",
        "apfl": "wardround.learning.methods.apfl:APFLSettings",
        "fedper": "wardround.learning.methods.fedper:FedPerSettings",
        "fedrep": "wardround.learning.methods.fedrep:FedRepSettings",
        "feddyn": "wardround.learning.methods.feddyn:FedDynSettings",
        "scaffold": "wardround.learning.methods.scaffold:ScaffoldSettings",
        "fednova": "wardround.learning.methods.fednova:FedNovaSettings",
        "fl_mrcm": "wardround.learning.methods.fl_mrcm:FLMRCMSettings",
        "fedgimp": "wardround.learning.methods.fedgimp:FedGIMPSettings",
        "moon": "wardround.learning.methods.moon:MOONSettings",
        "fedcostwavg": "wardround.learning.methods.cost_weighted:FedCostWAvgSettings",
        "fedpidavg": "wardround.learning.methods.cost_weighted:FedPIDAvgSettings",
        "harmofl": "wardround.learning.methods.harmofl:HarmoFLSettings",
        "fedex_lora": "wardround.learning.methods.fedex_lora:FedExLoRASettings",
        "flora": "wardround.learning.methods.flora:FLoRASettings",
        "fedsa_lora": "wardround.learning.methods.fedsa_lora:FedSALoRASettings",
        "feddg": "wardround.learning.methods.feddg:FedDGSettings",
        "fisher": "wardround.learning.methods.fisher:FisherSettings",
        "unlearn": "wardround.learning.methods.unlearn:UnlearnSettings",
        "fedmri": "wardround.learning.methods.fedmri:FedMRISettings",
        "modfed": "wardround.learning.methods.modfed:ModFedSettings",
        "fedpr": "wardround.learning.methods.fedpr:FedPRSettings",
        "fair_weights": "wardround.learning.methods.fair_weights:FairWeightsSettings",
        "custom": "wardround.study.methods:CustomMethod",
    },
    "acquisition": {
        "mri": "wardround.study.acquisition:MRIAcquisition",
        "ct": "wardround.study.ct:CTAcquisition",
        "mri_noncartesian": "wardround.study.noncartesian:NonCartesianAcquisition",
        "mri_raw": "wardround.study.raw_acquisition:RawAcquisition",
    },
}
#: Methods of studies that commands write: what a release may lose is measured, and what a hospital taught undone.
MEASURING, UNLEARNING = "fisher", "unlearn"
# The model of a study that names none, by its task; every other task builds its network itself.
MODELS: Mapping[str, str] = {
    "reconstruction": "modl",
    "segmentation": "monai_unet",
    "classification": "densenet",
    "prompted_segmentation": "lite_medsam",
    "chain": "modl",
    "chain_to_class": "modl",
    "pretraining": "mae_vit",
}
# Classical methods to compare with, in the order of reports.
BASELINES: Mapping[str, str] = {
    "zero_filled": "wardround.imaging.baselines.zero_filled:ZERO_FILLED",
    "fbp": "wardround.imaging.baselines.fbp:FBP",
    "cg_sense": "wardround.imaging.baselines.cg_sense:CG_SENSE",
    "tv": "wardround.imaging.baselines.tv:TV",
    "tv_real": "wardround.imaging.baselines.tv_real:TV_REAL",
    "weighted_tv": "wardround.imaging.baselines.weighted_tv:WEIGHTED_TV",
}
GROUPS: Mapping[str, str] = {
    "task": "wardround.tasks",
    "model": "wardround.models",
    "method": "wardround.methods",
    "acquisition": "wardround.acquisitions",
    "baseline": "wardround.baselines",
}
# Readers of image files; the name of an entry point is the ending that it reads, without the dot.
READERS = "wardround.readers"
BASES: Mapping[Section, type[Settings]] = {
    "task": TaskSettings,
    "model": ModelSettings,
    "method": MethodSettings,
    "acquisition": AcquisitionSettings,
}
CLOSED: Mapping[Section, type[Settings]] = {
    "task": ClosedTask,
    "model": ClosedModel,
    "method": ClosedMethod,
    "acquisition": ClosedAcquisition,
}


@dataclass(frozen=True)
class Reading:
    """How a study is read; the context of its validation.

    `opened` are settings of plug-ins that may be used, by section and kind. `foreign`: a plug-in that is not installed
    is no error (a model from elsewhere, say). `unread` sections are kept as they are, and nothing is imported for them.
    `near` is the folder of the study's file, for sections that name others beside it.
    """

    opened: Mapping[tuple[Section, str], type[Settings]] = field(default_factory=dict)
    foreign: bool = False
    unread: frozenset[Section] = frozenset()
    near: Path | None = None


STRICT = Reading()
NOTHING: Mapping[str, Any] = MappingProxyType({})


@cache
def builtin(section: Section, kind: str) -> type[Settings]:
    """The settings of one of the package's own kinds."""
    found: type[Settings] = at(BUILTIN[section][kind])
    return found


def builtins(section: Section) -> tuple[type[Settings], ...]:
    """The settings of all of the package's own kinds; imports them all."""
    return tuple(builtin(section, kind) for kind in BUILTIN[section])


def default(section: Section, **choices: Any) -> Any:
    """The settings of a study that says nothing, with `choices`."""
    return builtin(section, default_kind(section)).model_validate({"kind": default_kind(section), **choices})


def default_kind(section: Section) -> str:
    """The kind of a section without one."""
    return next(iter(BUILTIN[section]))


def implied_kind(section: Section, task: Any, given: Mapping[str, Any] = NOTHING) -> str:
    """The kind of a section without one in a study of a `task`: which model, the task says. Presets are of CT."""
    if section == "model" and isinstance(task, TaskSettings):
        return MODELS.get(task.kind, "own_network")
    return "ct" if section == "acquisition" and "preset" in given else default_kind(section)


def installed(section: Section) -> frozenset[str]:
    """The kinds that installed packages add; imports none of them."""
    return frozenset(entry_points(group=GROUPS[section]).names) - BUILTIN[section].keys()


def installed_baselines() -> frozenset[str]:
    """The baselines that installed packages add; imports none of them."""
    return frozenset(entry_points(group=GROUPS["baseline"]).names) - BASELINES.keys()


def baseline(name: str) -> Baseline:
    """One of the package's own baselines."""
    found: Baseline = at(BASELINES[name])
    return found


def check_baseline(name: str, found: Baseline, modality: Modality) -> None:
    """Raise `StudyError` where a baseline does not work on what a modality measures."""
    if not found.serves(modality):
        known = ", ".join(other for other in BASELINES if baseline(other).serves(modality))
        raise StudyError(f"task.evaluation.baselines: {name!r} is none of {modality.upper()}; choose from {known}")


def settings_of(section: Section, kind: str, reading: Reading = STRICT) -> type[Settings] | None:
    """What reads a section of this kind; `None` for an unknown kind. A plug-in's settings are closed until opened."""
    if section in reading.unread:
        return CLOSED[section]
    if kind in BUILTIN[section]:
        return builtin(section, kind)
    if (section, kind) in reading.opened:
        return reading.opened[section, kind]
    return CLOSED[section] if reading.foreign or kind in installed(section) else None


def read(section: Section, value: Any, info: ValidationInfo) -> Any:
    """A section of a study as the settings of its kind; what are settings already, stay."""
    if isinstance(value, Settings):
        return value
    if not isinstance(value, Mapping):
        raise PydanticCustomError("section", "must be a mapping with a `kind`")
    reading = info.context if isinstance(info.context, Reading) else STRICT
    task = info.data.get("task") if section == "model" else None
    given = {"kind": implied_kind(section, task, value), **value}
    kind = given["kind"]
    settings = settings_of(section, kind, reading) if isinstance(kind, str) else None
    if settings is None:
        known = sorted({*BUILTIN[section], *installed(section)})
        raise PydanticCustomError("unknown_kind", "unknown kind", {"tag": str(kind)[:64], "known": known})
    found = settings.model_validate(given, context=info.context)
    if "kind" not in value:
        # Filled in here, and not written: see `wardround.study.hashes`.
        found.model_fields_set.discard("kind")
    return found


def check_model(model: ModelSettings, task: TaskSettings) -> None:
    """Raise `StudyError` where a network does not serve the task."""
    if not (model.closed or task.closed or hasattr(model, task.network or "kind")):
        kinds = ", ".join(kind for m in _models() if hasattr(m, task.network) for kind in m.kinds())
        raise StudyError(f"model.kind: {model.kind} does not fit task.kind: {task.kind}; take {kinds}")


def check_modality(model: ModelSettings, modality: Modality) -> None:
    """Raise `StudyError` where a network cannot work on the images of a modality."""
    if model.modalities is not None and modality not in model.modalities:
        serving = (m for m in _models() if m.modalities is None or modality in m.modalities)
        kinds = ", ".join(kind for m in serving for kind in m.kinds())
        mine = " and ".join(sorted(m.upper() for m in model.modalities)) or "images and no raw data"
        raise StudyError(
            f"model.kind: {model.kind} is for {mine}, and these scans are {modality.upper()}; take {kinds}"
        )
    model.check(modality)


def _models() -> list[type[ModelSettings]]:
    return [model for model in builtins("model") if issubclass(model, ModelSettings)]

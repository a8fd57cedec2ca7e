"""What a study may not combine: each rule raises `ValueError`, which the study's reading turns into an error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wardround.study.methods import MethodSettings
from wardround.study.protection import NoCompression
from wardround.study.registry import UNLEARNING, builtins
from wardround.study.start import Fresh, FromRelease

if TYPE_CHECKING:
    from wardround.study.schema import Study


def check_given(study: Study) -> None:
    """Refuse what means nothing in a study that trains nothing, and what would promise something of it."""
    said, protection = "with schedule.rounds 0 nothing is trained", study.protection
    if isinstance(study.start, Fresh):
        raise ValueError(
            "schedule.rounds: 0 measures a given model, and `start` names none; name it (`start: {kind: weights, ...}` "
            "or `{kind: release, ...}`), or set schedule.rounds to 1 or more"
        )
    refused = {
        "protection.privacy": (
            protection.privacy is not None,
            "so no privacy is spent and no noise is added; what test results tell is for the sites' egress rules",
        ),
        "protection.secure": (
            protection.secure,
            "so there is no sum to mask; test results are each site's own release, under its egress rules",
        ),
        "protection.robust": (protection.robust is not None, "so there is no update to defend against"),
        "protection.compression": (
            not isinstance(protection.compression, NoCompression),
            "so there is no update to compress",
        ),
        "schedule.phases": (bool(study.schedule.phases), "so there are no phases"),
        "task.teacher": (study.task.taught_by is not None, "so there is nothing to teach"),
        study.task.leave_one_out_key: (study.task.leaves_out, "so no site can be left out of it"),
        "parts.local": (bool(study.parts.local), "so no site has a part of its own"),
        "adapters.local_rank": (
            bool(getattr(study.adapters, "local_rank", 0)),
            "so no site has adapters of its own",
        ),
    }
    for key, (given, why) in refused.items():
        if given:
            raise ValueError(f"{key}: {said}, {why}; leave it out")


def check_update(study: Study) -> None:
    """Refuse a section `update` where there is no release to continue, or it would not be measured as it is."""
    if study.update is None:
        return
    if not isinstance(study.start, FromRelease):
        raise ValueError(
            "update: the study continues a release, and `start` names none; set `start: {kind: release, file: ..., "
            "sha256: ...}` (`wardround update` fills it in), or leave `update` out"
        )
    if not study.trains:
        raise ValueError(
            "update: with schedule.rounds 0 nothing is trained, so there is no new model to compare with the release; "
            "set schedule.rounds to 1 or more, or leave `update` out"
        )
    for key, given in (("only", bool(study.start.only)), ("adapter", study.start.adapter is not None)):
        if given:
            raise ValueError(
                f"start.{key}: with `update` the release is measured as it is, beside the new model; leave `{key}` or "
                "`update` out"
            )


def check_evaluating_sites(study: Study) -> None:
    """Refuse sites of `role: evaluate` where their validation sums could not be merged, or would never be asked."""
    for name in study.evaluating_sites if study.trains else ():
        if study.protection.secure:
            raise ValueError(
                f"sites.{name}.role: `evaluate` cannot be combined with protection.secure: the site sends its "
                "validation sums by itself, so the coordinator would read what the masks hide of every other site; "
                "set it to `unseen` or `train`"
            )
        if not study.schedule.validate_every:
            raise ValueError(
                f"sites.{name}.role: `evaluate` needs validated rounds, and schedule.validate_every is 0; raise "
                "it, or set the role to `unseen`"
            )


def check_spectrum(study: Study) -> None:
    """Refuse a method that uses amplitudes of images where there are none, or where their sum is none."""
    asked, kind = study.method.spectrum, study.method.kind
    if asked is None:
        return
    if not (study.task.spectral or study.task.closed):
        raise ValueError(
            f"method.kind={kind} uses the spectra of images that a network sees, and task.kind {study.task.kind} has "
            "none of one shape; choose segmentation or classification, or another method"
        )
    if getattr(study.task, "imbalance", "none") == "balanced":
        raise ValueError(
            f"task.imbalance: balanced draws other examples than those asked for, so it is not known of how many "
            f"patients the amplitudes of method.kind={kind} are; take weighted or logit_adjusted"
        )
    if asked.bank and study.protection.robust is not None:
        raise ValueError(
            f"method.kind={kind} cannot be combined with protection.robust: each site fills places of the bank that "
            "no other fills, which a robust rule takes for outliers"
        )


def check_missing(study: Study) -> None:
    """Refuse contrasts that no image of the task has, sites without any, and tasks in which none can be missing."""
    images = study.task.may_lack
    if getattr(study.task, "drop_contrasts", 0.0) and not images:
        raise ValueError(
            "task.drop_contrasts: needs at least two of task.images, and as many task.channels, a file a channel"
        )
    for name, site in study.sites.items():
        key = f"sites.{name}.missing"
        if not site.missing or study.task.closed:
            continue
        if not images:
            raise ValueError(
                f"{key}: the images of task.kind {study.task.kind} are not of several files, each a channel, of "
                "which a site could lack one; leave it out"
            )
        if site.scans:
            raise ValueError(f"{key}: its patients are those of {', '.join(site.scans)}, which lack what they lack")
        if unknown := [contrast for contrast in site.missing if contrast not in images]:
            raise ValueError(f"{key}: {unknown[0]!r} is none of task.images ({', '.join(images)})")
        if set(site.missing) == set(images):
            raise ValueError(f"{key}: the site would have no image at all; leave one contrast")


def optional_contrasts(study: Study) -> frozenset[int]:
    """The places in `task.images` that a released model does without.

    All with `task.drop_contrasts`; else those that a site which trained it lacks.
    """
    images = study.task.may_lack
    if getattr(study.task, "drop_contrasts", 0.0) > 0.0:
        return frozenset(range(len(images)))
    missing = {contrast for site in study.training_sites for contrast in study.sites[site].missing}
    return frozenset(number for number, contrast in enumerate(images) if contrast in missing)


def check_forgetting(study: Study) -> None:
    """Refuse a study without a hospital that still has it, or that not everyone concerned approved."""
    forget, unlearns = study.forget, study.method.kind == UNLEARNING
    if unlearns != (forget is not None and forget.how == "unlearn"):
        raise ValueError("method.kind: `unlearn` belongs to `forget.how: unlearn`, and that to it; set both or neither")
    if forget is None:
        return
    if unlearns:
        if forget.site not in study.training_sites or getattr(study.method, "site", None) != forget.site:
            raise ValueError(
                f"forget.site: {forget.site} takes back what it taught, so it must be a site of `role: train`, and "
                "`method.site`; make it so, or retrain without it (`how: retrain`)"
            )
    elif forget.site in study.sites:
        raise ValueError(f"forget.site: {forget.site} left, so it is no site of the study; take it out of `sites`")
    start = study.start.sha256 if isinstance(study.start, FromRelease) else ""
    if forget.how == "retrain" and start == forget.release:
        raise ValueError(
            "forget.how: `retrain` cannot start from the model that is to be forgotten; start from an ancestor that "
            f"{forget.site} never trained, or fresh"
        )
    concerned = [*study.sites, *([] if forget.site in study.sites else [forget.site])]
    lacking = [name for name in concerned if name not in forget.approved_by]
    if lacking:
        raise ValueError(
            f"forget.approved_by: lacks {', '.join(lacking)}. The new model and the released one together reveal what "
            f"{forget.site} contributed, so each of them must approve; ask them and name them"
        )


def check_privacy(study: Study) -> None:
    """Refuse whatever would say something of a patient beside the noised gradients."""
    if study.protection.privacy is None:
        return
    if study.site_statistics:
        raise ValueError(
            "site_statistics: with protection.privacy nothing of a site's images leaves without noise, and these sums "
            "have none; set it to false"
        )
    if study.method.closed:
        return  # A plug-in's section is looked at once its settings are known; without them, nothing runs.
    if not study.method.noised:
        raise ValueError(
            f"method.kind={study.method.kind} cannot be combined with protection.privacy: what it computes from "
            f"data is not noised; choose {', '.join(_kinds(m for m in _methods() if m.noised))}"
        )
    if getattr(study.method, "weights", "equal") != "equal":
        raise ValueError(
            "method.weights: with protection.privacy a site's weight must be a public constant; set it to `equal`"
        )
    if study.schedule.release != "last":
        raise ValueError(
            "schedule.release: with protection.privacy the released round must not depend on validation patients, "
            "whose metrics carry no noise; set it to `last`"
        )
    if study.local.clip_norm is not None:
        raise ValueError("local.clip_norm: with protection.privacy, set protection.privacy.clip instead, and "
                         "remove this one (--set local.clip_norm=null)")  # fmt: skip
    if study.local.passes is not None:
        raise ValueError(
            "local.passes: with protection.privacy the number of a site's steps must be a public constant, and passes "
            "say how many examples it has; leave it out, and set local.steps"
        )
    if study.local.accumulate > 1:
        raise ValueError(
            "local.accumulate: with protection.privacy gradients are those of single patients, which pass the network "
            "one after another already (with `gradients: opacus`, a few at once); leave it out"
        )
    if study.local.checkpoint and study.protection.privacy.gradients == "opacus":
        raise ValueError(
            "local.checkpoint: Opacus keeps what layers see, which checkpointing forgets; set "
            "protection.privacy.gradients: exact, or leave local.checkpoint out"
        )
    if study.protection.privacy.noise == "distributed":
        _check_noise_adds_up(study)


def _check_noise_adds_up(study: Study) -> None:
    """Refuse whatever makes an update more than a sum of patients' gradients."""
    local, said = study.local, "with protection.privacy.noise=distributed an update must be one sum of gradients"
    if study.parts.local:
        raise ValueError(f"parts.local: {said}, and no site follows its own; leave it out, or set `noise: site`")
    if getattr(study.adapters, "local_rank", 0):
        raise ValueError(f"adapters.local_rank: {said}, and no site follows its own; set it to 0, or set `noise: site`")
    if not study.method.adds_up:
        fit = " or ".join(f"`{kind}`" for kind in _kinds(m for m in _methods() if m.adds_up))
        raise ValueError(f"method.kind={study.method.kind}: {said}; set it to {fit}")
    if local.steps != 1:
        raise ValueError(f"local.steps={local.steps}: {said}; set it to 1, and raise schedule.rounds")
    if local.optimizer != "sgd" or local.momentum or local.weight_decay:
        raise ValueError(f"local: {said}; set `optimizer: sgd`, without momentum and weight decay")
    if local.schedule != "constant" or local.warmup:
        raise ValueError(f"local: {said} of one size; set `schedule: constant` and `warmup: 0`")
    if study.task.leaves_out:
        raise ValueError(
            f"{study.task.leave_one_out_key}: the noise of protection.privacy.noise=distributed is sized for all "
            "sites together; set it to false"
        )


def _methods() -> tuple[type[MethodSettings], ...]:
    return tuple(settings for settings in builtins("method") if issubclass(settings, MethodSettings))


def _kinds(settings: Iterable[type[MethodSettings]]) -> list[str]:
    return sorted(kind for each in settings for kind in each.kinds())

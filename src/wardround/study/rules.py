"""What a study may not combine: each rule raises `ValueError`, which the study's reading turns into an error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wardround.study.methods import MethodSettings
from wardround.study.protection import NoCompression
from wardround.study.registry import builtins
from wardround.study.start import Fresh

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

"""The arms of a run: the federation, and what it is compared with. Every arm runs on the same machinery."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wardround.errors import StudyError
from wardround.study.methods import MethodSettings
from wardround.study.protection import Compression, NoCompression, Robust
from wardround.study.registry import default
from wardround.study.schema import Local, Study
from wardround.study.start import Parts
from wardround.wire.canonical import digest

if TYPE_CHECKING:
    from wardround.learning.methods.method import Method

POOLED = "pooled"
FEDERATED = "federated"
LOCAL, WITHOUT = "local/", "without/"
Comparison = Literal["local", "pooled"]
COMPARISONS: tuple[Comparison, ...] = ("local", "pooled")


@dataclass(frozen=True)
class Arm:
    """A training run: who takes part, by which method, with which local schedule.

    `sites` train, with the patients of `members`; in a study that trains nothing there are none, and the model serves
    the members as its own.

    A local arm is a federation of one; the pooled arm is one site that has everybody's data and takes as many
    steps as each site, on batches as large as all sites' together: it processes the union of what the sites process.
    """

    name: str
    sites: tuple[str, ...]
    members: tuple[str, ...]
    method: MethodSettings
    local: Local
    #: Sites that do not train and whose validation patients count in the arm's validated rounds.
    evaluators: tuple[str, ...] = ()

    def identity(self, study_sha256: str, plan_sha256: str) -> str:
        """The hash that messages and journals of this arm carry."""
        return digest([study_sha256, plan_sha256, self.name])

    def parts(self, study: Study) -> Parts:
        """The roles that the study gives by name; what stays at a site is shared in an arm of one party, with itself.

        The one place where arms could differ in their models: today they differ in roles alone.
        """
        return study.parts.model_copy(update={"local": ()}) if self.alone else study.parts

    @property
    def alone(self) -> bool:
        """Whether one party trains it, with its own patients or with everybody's."""
        return self.name == POOLED or self.name.startswith(LOCAL)

    def threshold(self, study: Study) -> int | None:
        """The threshold of the arm's secure sum; `None` where it sums in the clear.

        An arm of one site has no other site to be summed with. Raises `StudyError` for a federation that is too small.
        """
        if not self.masked(study):
            return None
        return study.protection.threshold_for(len(self.sites))

    def masked(self, study: Study) -> bool:
        """Whether the arm's updates are summed under masks."""
        return study.protection.secure and len(self.sites) > 1

    def inside(self, study: Study) -> bool:
        """Whether a site trains the arm by itself: what came out of it would give away its share of a masked sum."""
        return study.protection.secure and self.name.startswith(LOCAL)

    def compression(self, study: Study) -> Compression:
        """How the arm's updates are compressed: not at all in a comparison of one site, which has nobody to send to."""
        alone = len(self.sites) == 1 and self.name != FEDERATED
        return NoCompression() if alone else study.protection.compression

    def robust(self, study: Study) -> Robust | None:
        """The robust mean of the arm; `None` where it takes the plain one, as an arm of one site does."""
        return None if len(self.sites) == 1 else study.protection.robust

    def check_needs(self, method: Method, study: Study) -> None:
        """Raise `StudyError` where `method` needs each site's update, and the study hides or changes single ones."""
        if method.needs == "sum":
            return
        said = f"method.kind={self.method.kind} needs each site's update"
        if self.masked(study):
            raise StudyError(
                f"{said}, which protection.secure hides in their sum; leave out protection.secure, or choose a method "
                "of sums: of low-rank products fedavg with adapters.factors: second, whose average is exact, or "
                "fedsa_lora"
            )
        if self.robust(study) is not None:
            raise StudyError(f"{said} as it is; leave out protection.robust")
        if self.compression(study) != NoCompression():
            raise StudyError(f"{said} as it is; leave out protection.compression")

    @property
    def folder(self) -> str:
        """The arm's name as a folder."""
        return self.name.replace("/", "-")


def arms_of(study: Study, compare: Collection[str]) -> tuple[Arm, ...]:
    """The federation, the comparisons asked for, and the left-out runs of the study; long ones first.

    Raises `StudyError` for a comparison that does not exist, or that undoes what the study promises.
    """
    unknown = sorted(set(compare) - set(COMPARISONS))
    if unknown:
        raise StudyError(f"--compare {unknown[0]}: choose from {', '.join(COMPARISONS)}")
    if compare and not study.trains:
        raise StudyError(
            f"--compare {sorted(compare)[0]}: with schedule.rounds 0 nothing is trained, so no other training is "
            "compared with; leave it out"
        )
    privacy = study.protection.privacy
    if POOLED in compare and privacy is not None:
        raise StudyError(
            "--compare pooled: pooled data know no site's privacy budget; compare with local, or pool in a run without "
            "protection.privacy"
        )
    if compare and privacy is not None and privacy.noise == "distributed":
        raise StudyError(
            "--compare local: with protection.privacy.noise=distributed a site alone has too little noise; leave it out"
        )
    if study.task.leaves_out:
        _check_left_out(study)
    return every_arm(study, compare)


def _check_left_out(study: Study) -> None:
    training = study.training_sites
    if study.protection.secure:
        raise StudyError(
            f"{study.task.leave_one_out_key}: with protection.secure, the sum of all sites minus the sum without one "
            "is the update of that one, so no left-out arm is trained; set it to false"
        )
    if len(training) < 3:
        raise StudyError(f"{study.task.leave_one_out_key} needs at least 3 training sites")
    if study.protection.robust is not None:
        study.protection.robust.tolerated(len(training) - 1)


def every_arm(study: Study, compare: Collection[str] = COMPARISONS) -> tuple[Arm, ...]:
    """The arms that a model of the study may come from, also of a run that this version would refuse."""
    # All that are compared choose their round on the same patients; a site alone has its own and no others.
    training, evaluators = study.training_sites, study.evaluating_sites if study.trains else ()
    alone: MethodSettings = default("method", weights="equal")
    arms = [Arm(FEDERATED, training, study.member_sites, study.method, study.local, evaluators)]
    if POOLED in compare:
        # One step of every site in the federation is one step on the union of their batches here (law of the centre).
        union = study.local.model_copy(update={"batch": study.local.batch * len(training)})
        arms.insert(0, Arm(POOLED, (POOLED,), training, alone, union, evaluators))
    if study.task.leaves_out:
        for site in training:
            rest = tuple(s for s in training if s != site)
            arms.append(Arm(WITHOUT + site, rest, rest, study.method, study.local, evaluators))
    if "local" in compare:
        arms.extend(Arm(LOCAL + site, (site,), (site,), alone, study.local) for site in training)
    return tuple(arms)

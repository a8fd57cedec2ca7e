"""What a study says that goes on from a released model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wardround.study.base import Config
from wardround.study.start import Below, FromRelease, Hash
from wardround.study.teacher import TaughtBy


class FisherFile(Config):
    """The Fisher information of the release, which a study of `method: {kind: fisher}` measured."""

    file: Below = Field(
        description="`models/fisher.safetensors` of that run, where it lies below the study's folder; a site may have "
        "it in its `weights` instead"
    )
    sha256: Hash = Field("", description="of the file's bytes; without it an error says what it is")


class ForgetAsItMay(Config):
    """Nothing holds the new model to the release but where it starts."""

    kind: Literal["none"] = "none"

    def describe(self) -> str:
        """What `check` and the model's card print of it."""
        return "nothing holds the model to the release"


class Elastic(Config):
    """EWC: a pull to the release, strong for the weights that mattered at the sites that it learned from."""

    kind: Literal["ewc"]
    weight: float = Field(
        1000.0,
        ge=0.0,
        description="lambda: each step lowers loss + weight / 2 x sum of F (w - w_release)^2 over all shared weights "
        "(Kirkpatrick et al., 2017, eq. 3); choose it on validation patients",
    )
    fisher: FisherFile | None = Field(
        None, description="F, by weight: `wardround update` measures it at the release's sites and fills this in"
    )

    def describe(self) -> str:
        """With its weight and, once it is known, the file that it needs."""
        of = "" if self.fisher is None else f", Fisher information of sha256 {self.fisher.sha256}"
        return f"ewc, weight {self.weight:g}{of}"


class Distilled(Config):
    """LwF: on the new patients' images, the new model is to go on saying what the release says."""

    kind: Literal["lwf"]
    weight: float = Field(
        1.0,
        gt=0.0,
        description="lambda_o: each step lowers own loss + weight x cross-entropy with what the release says (Li & "
        "Hoiem, 2017), both divided by 1 + weight / temperature^2",
    )
    temperature: float = Field(2.0, gt=0.0, description="by which logits are divided before they are compared")

    def teacher(self, start: FromRelease) -> TaughtBy:
        """The release as the teacher of a study.

        A teacher's loss is alpha own + (1 - alpha) T^2 KL; the paper's is own + weight KL, up to the entropy of what
        the release says, which moves no weight. With alpha = T^2 / (T^2 + weight) the first is alpha times the second.
        """
        square = self.temperature**2
        return TaughtBy(
            file=start.file, sha256=start.sha256, alpha=square / (square + self.weight), temperature=self.temperature
        )

    def describe(self) -> str:
        """With both numbers."""
        return f"lwf, weight {self.weight:g}, temperature {self.temperature:g}"


Retain = Annotated[ForgetAsItMay | Elastic | Distilled, Field(discriminator="kind")]


class FineTune(Config):
    """After the last round each training site goes on by itself from the released model, and keeps the result."""

    steps: int = Field(100, ge=1, description="optimiser steps at the site, on batches as in training")
    lr: float = Field(1e-4, gt=0.0, description="constant")

    def describe(self) -> str:
        """With both numbers."""
        return f"{self.steps} steps at each site, lr {self.lr:g}; the site's own, and sent nowhere"


#: The row of the results with what the release gives that a study continues.
PARENT = "parent"


class Update(Config):
    """A study that continues a release: `start` names it, and the new model takes its place only if no site loses."""

    margins: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=dict,
        description="by metric, how much worse than the release the new model may be at a site, in the metric's unit: "
        "the lower end of the 95 % interval of the paired difference must lie above minus this. Default: the task's "
        "first metric, 0.02 of Dice, 0.1 dB, 0.01 of AUROC",
    )
    ancestors: tuple[Hash, ...] = Field(
        (),
        description="the releases that the release came of, by `model_sha256`, the nearest first: a site that was away "
        "for some of them still knows who of its patients trained one. `wardround update` fills it in",
    )
    train_on: Literal["new", "all", "old"] = Field(
        "new",
        description="which of a training site's training patients train: those that no release before learned from, "
        "`all`, or `old`: those that did (to measure a release's Fisher information, say)",
    )
    memory: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="with `train_on: new`, the share of a site's other training patients that train beside the new "
        "ones. The site draws them by a secret of its own, the same ones each time",
    )
    retain: Retain = Field(ForgetAsItMay(), description="what keeps the model from forgetting what the release knows")
    finetune: FineTune | None = Field(None, description="what each site does for itself after the last round")

    def describe(self) -> str:
        """What `check` prints of it: who trains, what holds the model to the release, what sites do by themselves."""
        who = {
            "new": "patients from whom no release before learned",
            "all": "all training patients",
            "old": "training patients from whom a release before learned",
        }[self.train_on]
        some = f" and {self.memory:.3g} of the others" if self.memory else ""
        tuned = "" if self.finetune is None else f"; then {self.finetune.describe()}"
        return f"on {who}{some}; {self.retain.describe()}{tuned}"

"""What a site has agreed to before a run begins: the study and arm it answers for, and what may leave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from wardround.federation.parts import Lasting
from wardround.federation.plans import staleness_of
from wardround.plan.arm_specs import ArmSpecs
from wardround.protection.compression import PLAIN, Codec
from wardround.site.egress import OPEN, EgressRules
from wardround.wire.update import Layout

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rules:
    """What a site has agreed to: the study and arm it answers for, and what may leave; `layout` is after `codec`.

    With `lint` it looks at every model before it trains on it (`Inspector`), and lets up to `catch_up` rounds that it
    missed explain a move: those of its operator, or of a study with asynchronous rounds where these are more. `rounds`
    is how many there are, where that is known, with one more for each aborted one where that `extends` the study; there
    are aborted ones only where updates are summed `masked`. It measures the model of the `arm`, and the `baselines`.
    Scales start at `initial_scale`, or higher where the state before round 1, `initial` by group and tensor, says so.
    Updates are rounded from `rounding_root`; without one, from a root that the operating system gives and that stays in
    the site's store. Its validation sums are `hidden` where they leave under masks, or not at all.
    """

    identity: str
    layout: Layout
    metrics_layout: Layout
    evaluation_layout: Layout
    seed: int
    #: What of a broadcast the rounds that follow have as it is.
    lasting: Lasting
    egress: EgressRules = OPEN
    codec: Codec = PLAIN
    lint: bool = True
    catch_up: int = 0
    initial_scale: float = 0.2
    rounds: int | None = None
    extends: bool = False
    masked: bool = False
    arm: str = ""
    baselines: frozenset[str] = frozenset()
    initial: Mapping[str, Array] = field(default_factory=dict, repr=False)
    rounding_root: bytes | None = field(default=None, repr=False)
    hidden: bool = False

    @property
    def given(self) -> bool:
        """Whether the study trains nothing, so that the one model to measure is what it starts from."""
        return self.rounds == 0

    @property
    def layouts(self) -> dict[str, int]:
        """The layouts of the study, and the bytes of an update of each."""
        sums = {layout.sha256: layout.nbytes for layout in (self.metrics_layout, self.evaluation_layout)}
        return {**sums, self.layout.sha256: self.codec.form.nbytes(self.layout)}


def rules_of(
    arm_specs: ArmSpecs,
    name: str,
    *,
    egress: EgressRules = OPEN,
    lint: bool = True,
    catch_up: int = 0,
    rounding_root: bytes | None = None,
) -> Rules:
    """What a site of an arm agrees to; all but the arm is its own.

    Without a `rounding_root` the site draws a secret one, from which its updates are rounded.
    """
    arm_spec, study = arm_specs.arm_spec(name), arm_specs.study
    late = staleness_of(study, arm_spec.arm)
    return Rules(
        identity=arm_spec.identity,
        layout=arm_spec.codec.sent(arm_spec.layout),
        metrics_layout=arm_spec.metrics_layout,
        evaluation_layout=arm_spec.evaluation_layout,
        seed=study.seed,
        lasting=Lasting(arm_spec.method, arm_spec.layout, arm_spec.curriculum),
        egress=egress,
        codec=arm_spec.codec,
        lint=lint,
        # In asynchronous rounds a site is without some as a rule: as many as its update may be late.
        catch_up=max(catch_up, 0 if late is None else late.most),
        initial_scale=study.protection.initial_scale,
        rounds=study.schedule.rounds,
        extends=arm_specs.extends(arm_spec.arm),
        masked=arm_spec.arm.masked(study),
        arm=name,
        baselines=frozenset(study.compared_rows),
        initial=arm_specs.start(arm_spec),
        rounding_root=rounding_root,
        hidden=arm_spec.arm.threshold(study) is not None or arm_spec.arm.inside(study),
    )

"""What the messages of a study will weigh, before any is sent: the very messages, with bodies that are not there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wardround.federation.exchange import EVALUATE, TRAIN, UPDATE, Call
from wardround.federation.logs import ANCHOR, HEAD, HEADS
from wardround.federation.measuring import BASELINE, CONTINUED, FINETUNED, RELEASED
from wardround.federation.metering import Meter
from wardround.federation.plans import plan_of
from wardround.learning.methods.method import MODEL
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.arms import FEDERATED, WITHOUT, Arm
from wardround.wire.bill import NO_BILL, Bill
from wardround.wire.message import EmptyBody, Message
from wardround.wire.scales import ScaleRules
from wardround.wire.sparse import DENSE
from wardround.wire.tensors import TensorInfo, table_of

_HASH = "0" * 64
# As long as that of a site's log with its check.
_HEAD = "0" * 80


@dataclass(frozen=True)
class Expected:
    """What one site's messages weigh. `secure`: keys and shares of the secure sum come on top.

    `training` is a round of a site that trains, `last` the validation of the last one there, `validation` a round of a
    site that only evaluates (where it is validated), `tests` what is asked after the rounds, of every arm's model, with
    the delivery of the released one. A model that each site that trains fine-tunes for itself is counted at all sites.
    """

    training: Bill
    last: Bill
    validation: Bill
    tests: Bill
    secure: bool

    def of_round(self, role: str) -> Bill:
        """A round of a site of a role."""
        return {"train": self.training, "evaluate": self.validation}.get(role, NO_BILL)

    def in_all(self, role: str, rounds: int, validate_every: int) -> int:
        """Bytes of a site of a role in a whole run, both ways."""
        validated = rounds // validate_every if validate_every else 0
        bills = {"train": (rounds, self.last), "evaluate": (validated, NO_BILL)}
        # A study without rounds validates none.
        times, more = bills.get(role, (0, NO_BILL)) if rounds else (0, NO_BILL)
        of_round = self.of_round(role)
        return times * (of_round.down.total + of_round.up.total) + sum(
            bill.down.total + bill.up.total for bill in (more, self.tests)
        )


def expected(arm_specs: ArmSpecs) -> Expected:
    """The bill of a site in the federated arm and after it. Raises `StudyError` where the study makes no model."""
    arm_spec, plan = arm_specs.arm_spec(FEDERATED), plan_of(arm_specs, FEDERATED)
    public, private = arm_specs.initial(arm_spec)
    sent = plan.codec.sent(plan.layout)
    scales = ScaleRules(sent, plan.initial_scale, plan.initial, frozenset({MODEL})).start
    rounds, logs = plan.rounds, {ANCHOR: _HASH, HEADS: dict.fromkeys(plan.sites, _HEAD)}
    table = (*table_of(public), *arm_spec.method.added(public, len(plan.sites)))
    train = Call(
        TRAIN,
        plan.identity,
        rounds,
        plan.sites,
        sent,
        scales,
        meta={"keep": [rounds, rounds], "validate": True, **logs},
        tensors=table,
        body=EmptyBody(sum(info.nbytes for info in table)),
        form=plan.codec.form,
    )
    about = {"split": "validation"}
    last = replace(train, kind=EVALUATE, layout=plan.metrics_layout, scales={}, meta=about, form=DENSE)
    served = arm_spec.method.release_for(None, public, private)
    measured = {**about, "evaluator": RELEASED, "unseen_site": True, "model": _HASH, "picture": FEDERATED}
    body = EmptyBody(sum(array.nbytes for array in served.values()))
    validate = replace(last, meta=measured, tensors=table_of(served), body=body)
    arms = [arm for arm in arm_specs.arms.values() if not arm.inside(arm_specs.study)]
    left_out = [arm for arm in arms if arm.name.startswith(WITHOUT)]
    tests = NO_BILL
    # Every site measures the models of all arms, but of those without one site only that without itself.
    for arm in (*(arm for arm in arms if arm not in left_out), *left_out[:1]):
        tests += _billed(arm_specs, _tested(arm_specs, arm, validate))
    for row in _carried_by_none(arm_specs):
        asked = {"split": "test", "evaluator": row}
        tests += _billed(arm_specs, replace(last, layout=arm_spec.evaluation_layout, meta=asked))
    released = Bill(down=arm_spec.kinds.of_table(_model(arm_specs, arm_spec.arm)))
    return Expected(
        _billed(arm_specs, train),
        _billed(arm_specs, last) if plan.validate_every else NO_BILL,
        _billed(arm_specs, validate) if plan.validate_every else NO_BILL,
        tests + released,
        arm_spec.arm.masked(arm_specs.study),
    )


def _carried_by_none(arm_specs: ArmSpecs) -> tuple[str, ...]:
    """The rows of a test whose requests carry no model: sites have it, or it learns nothing."""
    study = arm_specs.study
    tuned = study.update is not None and study.update.finetune is not None and study.trains
    return (
        *(BASELINE for _ in study.baselines),
        *((CONTINUED,) if study.update is not None else ()),
        *((FINETUNED,) if tuned else ()),
    )


def _tested(arm_specs: ArmSpecs, arm: Arm, like: Call) -> Call:
    """The request to measure an arm's model on test patients."""
    table = _model(arm_specs, arm)
    body = EmptyBody(sum(info.nbytes for info in table))
    return replace(like, layout=arm_specs.arm_spec(arm.name).evaluation_layout, tensors=table, body=body)


def _model(arm_specs: ArmSpecs, arm: Arm) -> tuple[TensorInfo, ...]:
    """The tensors of an arm's released model, as sites get it to measure it: not what is frozen."""
    frozen = arm_specs.arm_spec(arm.name).policy.names("frozen")
    return tuple(p.info for p in arm_specs.model_context.parameters if p.name not in frozen)


def _billed(arm_specs: ArmSpecs, call: Call) -> Bill:
    """A request to the site with the longest name, and its answer."""
    meter = Meter(arm_specs.arm_spec(FEDERATED).kinds, call.layout, call.form)
    request = call.message(max(arm_specs.study.sites, key=len))
    meter.sent(request)
    reply = request.reply(UPDATE, meta={"layout": call.layout.sha256, HEAD: _HEAD})
    nbytes = call.form.nbytes(call.layout)
    meter.came(Message(replace(reply.header, body_nbytes=nbytes, body_sha256=_HASH), EmptyBody(nbytes)))
    return meter.bill

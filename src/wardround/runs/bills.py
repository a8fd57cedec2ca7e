"""The bill of a run: what its messages weigh, by arm and by kind. Opens nothing of a site."""

from __future__ import annotations

from collections.abc import Iterable

from wardround.federation.exchange import Engine
from wardround.federation.metering import Meter, Metered
from wardround.plan.arms import FEDERATED
from wardround.results.files import read_rounds
from wardround.results.schema import ArmBill, Traffic
from wardround.results.schema import Bill as Written
from wardround.runs.context import Context
from wardround.wire.bill import Bill, Sizes
from wardround.wire.message import Message


class Bills:
    """Counts what is in no round, and adds the rounds, which the journals of the arms count."""

    def __init__(self, host: Context) -> None:
        specs = {name: host.arm_spec(name) for name in host.arms}
        self._out = host.out
        self._arms = {name: Meter(spec.kinds, spec.evaluation_layout) for name, spec in specs.items()}
        self._identities = {spec.identity: self._arms[name] for name, spec in specs.items()}
        federated = specs[FEDERATED]
        self._study = Meter(federated.kinds, federated.evaluation_layout)

    def counting(self, engine: Engine) -> Metered:
        """The engine, with what it carries on the bill."""
        return Metered(engine, self._identities, self._study)

    def add(self, messages: Iterable[Message]) -> None:
        """Put messages to sites on the bill of the study as a whole."""
        for message in messages:
            self._study.sent(message)

    def traffic(self) -> Traffic:
        """The bill so far, with the committed rounds of all arms."""
        rounds = dict.fromkeys(self._arms, Bill())
        for line in read_rounds(self._out):
            if line.arm in rounds:
                rounds[line.arm] += _read(line.bill)
        federated = rounds[FEDERATED]
        return Traffic(
            bytes_up=federated.up.total,
            bytes_down=federated.down.total,
            arms={
                name: ArmBill(rounds=_written(rounds[name]), tests=_written(meter.bill))
                for name, meter in self._arms.items()
            },
            study=_written(self._study.bill),
        )


def _read(written: Written) -> Bill:
    return Bill(Sizes(**dict(written.up)), Sizes(**dict(written.down)))


def _written(bill: Bill) -> Written:
    return Written.model_validate(bill, from_attributes=True)

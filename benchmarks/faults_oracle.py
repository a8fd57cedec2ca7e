"""What the finished studies of the fault benchmark came to, judged from their final models.

The oracle looks into no journal and no log. An entry of the model that is zero is a lost update, one that differs from
its share an update that counted twice. Under masks, which sites a round holds is what a witness on the line saw
announced, which rounds count is what the model holds, and the model must be, bit for bit, the plain sum of those
updates, made here without coordinator, exchange or masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faults_study import CHANGE, PLAIN, ROOT, ROUNDS, SECURE, Federation, Setting, announced, opened
from wardround.errors import JournalError
from wardround.learning.methods.method import MODEL
from wardround.plan.sums import LOSS, SECONDS
from wardround.protection.rounding import rounding
from wardround.storage.verify import verify
from wardround.wire.ring import ExactSum
from wardround.wire.scales import next_scales
from wardround.wire.update import Aggregate, encode, scale_key

Floats = npt.NDArray[np.float32]


@dataclass
class Verdicts:
    """Counts over all studies. `expected` and `secure_expected` are the hashes of models without any fault."""

    expected: str
    secure_expected: str = ""
    trials: int = 0
    equal: int = 0
    lost: int = 0
    doubled: int = 0
    site_state_wrong: int = 0
    false_alarms: int = 0
    charges_wrong: int = 0
    secure_trials: int = 0
    secure_sum_equal: int = 0
    secure_whole: int = 0
    secure_whole_equal: int = 0
    aborted_rounds: int = 0
    second_lists: int = 0

    def judge(self, folder: Path, setting: Setting = PLAIN) -> None:
        """Look at the final model of a study that is over."""
        with opened(folder, setting) as federation:
            if setting.threshold is None:
                self._judge_plain(federation)
            else:
                self._judge_secure(folder, federation)
            if setting.private:
                self._judge_charges(federation)
        self.false_alarms += bool(verify(folder).damages)

    def _judge_plain(self, federation: Federation) -> None:
        state = federation.last()
        self.trials += 1
        self.equal += state.public_sha256 == self.expected and state.round == ROUNDS
        self._count(state.public["model/weight"], federation.setting.names, federation.setting.names)
        for site in federation.sites.values():
            kept = float(site.store.memory(ROUNDS).tensors["kept"][0])
            self.site_state_wrong += kept != 2.0**ROUNDS - 1

    def _judge_secure(self, folder: Path, federation: Federation) -> None:
        state, setting = federation.last(), federation.setting
        weight = np.array(state.public["model/weight"])
        rows = weight.reshape(setting.numbers, len(setting.names))
        counted = [number for number in range(1, setting.numbers + 1) if rows[number - 1].any()]
        lists = announced(folder)
        self.secure_trials += 1
        self.aborted_rounds += max(counted, default=0) - len(counted)
        # A round that is not in the model at all has lost every update, one too many has doubled them.
        self.lost += max(0, ROUNDS - len(counted)) * len(setting.names)
        self.doubled += max(0, len(counted) - ROUNDS) * len(setting.names)
        self.second_lists += sum(len(seen) > 1 for seen in lists.values())
        survivors = {number: min(lists.get(number, {()})) for number in counted}
        for number in counted:
            self._count(rows[number - 1], survivors[number], setting.names)
        self.secure_sum_equal += weight.tobytes() == plain_sum(survivors, setting).tobytes()
        if counted == list(range(1, ROUNDS + 1)) and all(s == setting.names for s in survivors.values()):
            self.secure_whole += 1
            self.secure_whole_equal += state.public_sha256 == self.secure_expected
        last = max(counted, default=0)
        aborted = [number for number in range(1, last) if number not in counted]
        for name, site in federation.sites.items():
            memory = site.store.memory(last, without=aborted)
            bits = int(memory.tensors["kept"][0]) if "kept" in memory.tensors else 0
            kept = {number for number in range(1, setting.numbers + 1) if bits >> (number - 1) & 1}
            # A site whose update came too late does not know that its round counted without it.
            self.site_state_wrong += not {n for n in counted if name in survivors[n]} <= kept <= set(counted)

    def _count(self, row: Floats, survivors: tuple[str, ...], names: tuple[str, ...]) -> None:
        """Entries of rounds that hold the updates of the survivors, in the order of the names."""
        share = row / (CHANGE / max(1, len(survivors)))
        inside = np.tile([name in survivors for name in names], share.size // len(names))
        self.lost += int((share[inside] < 0.5).sum())
        self.doubled += int((share[inside] > 1.01).sum()) + int((share[~inside] != 0).sum())

    def _judge_charges(self, federation: Federation) -> None:
        for name in federation.setting.names:
            try:
                paid = [entry.round for entry in federation.charged(name)]
            except JournalError:
                paid = []
            self.charges_wrong += paid != list(range(1, ROUNDS + 1))


def plain_sum(survivors: Mapping[int, tuple[str, ...]], setting: Setting = SECURE) -> Floats:
    """The model after rounds with these numbers, of the plain sums of these sites' updates."""
    weight = setting.nothing()
    scales = {scale_key(MODEL, "weight"): 1.0}
    for index, number in enumerate(sorted(number for number, names in survivors.items() if names)):
        total = ExactSum(setting.layout.segments)
        for name in survivors[number]:
            random = rounding(ROOT, name, number, scales, hashlib.sha256(weight.tobytes()).hexdigest())
            changes = {MODEL: {"weight": setting.change(number, name)}}
            offset = 0
            for chunk in encode(setting.layout, scales, {MODEL: 1.0}, changes, {LOSS: 0.0, SECONDS: 0.0}, random):
                total.add(chunk, offset)
                offset += len(chunk)
        aggregate = Aggregate(setting.layout, total, scales)
        weight = (aggregate.mean(MODEL, "weight") + weight).astype(np.float32)
        scales, _ = next_scales(aggregate, first=index == 0)
    return weight

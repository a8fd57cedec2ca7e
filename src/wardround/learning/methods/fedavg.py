"""FedAvg: the weighted mean, which every other method changes in places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from wardround.learning.methods.method import Method
from wardround.study.methods import AveragingSettings


class FedAvgSettings(AveragingSettings):
    """Weighted averaging (McMahan et al., 2017)."""

    kind: Literal["fedavg"] = "fedavg"
    noised = True
    late = True
    adds_up = True

    def build(self, protocols: Mapping[str, Any]) -> Method:
        """The base of all methods."""
        return Method(self.weights, own_norm=self.unseen_norm == "own")

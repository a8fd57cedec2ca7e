"""How a metric is named, rounded and compared: as the run's task says, and nothing guessed from a name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MINUS = "\N{MINUS SIGN}"
NO_BREAK = "\N{NO-BREAK SPACE}"
_MOST_DECIMALS = 4


@dataclass(frozen=True)
class Metric:
    """How one metric is named, rounded and compared; `negligible` is a difference not worth a claim."""

    name: str
    label: str
    unit: str
    larger_is_better: bool
    negligible: float
    definition: str

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Metric:
        """From an entry of `metric_specs`; raises KeyError, TypeError and ValueError for anything else."""
        return cls(
            name=str(spec["name"]),
            label=str(spec["label"]),
            unit=str(spec["unit"]),
            larger_is_better=bool(spec["larger_is_better"]),
            negligible=float(spec["negligible"]),
            definition=str(spec["definition"]),
        )

    @property
    def decimals(self) -> int:
        """As many as show a difference that is not negligible."""
        if not 0.0 < self.negligible < 1.0:
            return 0 if self.negligible >= 1.0 else _MOST_DECIMALS
        return min(_MOST_DECIMALS, math.ceil(-math.log10(self.negligible) - 1e-9))

    def show(self, value: float) -> str:
        """The value, rounded, without its unit."""
        if not math.isfinite(value):
            return "∞" if value > 0 else f"{MINUS}∞"
        return f"{value:.{self.decimals}f}".replace("-", MINUS)

    def amount(self, value: float) -> str:
        """The value with its unit, or with the metric's label where it has none."""
        return f"{self.show(value)}{NO_BREAK}{self.unit or self.label}"

    def difference(self, value: float) -> str:
        """A signed difference, rounded, without its unit; what rounds to nothing has no sign."""
        text = self.show(abs(value))
        if not text.strip("0."):
            return text
        return f"{'+' if value > 0 else MINUS}{text}"

    def signed(self, value: float) -> str:
        """A signed difference with its unit, or with the metric's label where it has none."""
        return f"{self.difference(value)}{NO_BREAK}{self.unit or self.label}"

    def printed(self, gain: float) -> float:
        """A gain (positive is better) in the metric's own direction: a better NMSE is negative."""
        return gain if self.larger_is_better else -gain

    def span(self, gains: tuple[float, float]) -> str:
        """The interval of a gain as signed differences in the metric's own direction."""
        low, high = sorted(self.printed(end) for end in gains)
        return f"{self.difference(low)} to {self.difference(high)}"

    def gain(self, value: float, reference: float) -> float:
        """How much better `value` is than `reference`: positive is better whatever the metric's direction."""
        return value - reference if self.larger_is_better else reference - value


def metrics_in(result: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The metrics of a result.json in the task's order; raises ValueError where they do not say how they are read."""
    try:
        return tuple(Metric.of(spec) for spec in result["metric_specs"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("no metric_specs, or entries of it that are none") from error

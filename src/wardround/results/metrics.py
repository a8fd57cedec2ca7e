"""How a metric is named, rounded and compared: as the run's task says, and nothing guessed from a name."""

from __future__ import annotations

import math

from pydantic import Field

from wardround.study.base import Config

MINUS = "\N{MINUS SIGN}"
NO_BREAK = "\N{NO-BREAK SPACE}"
_MOST_DECIMALS = 4


class MetricInfo(Config):
    """How one metric of a task is named, rounded and compared."""

    name: str
    label: str
    unit: str = Field(description="empty for a plain number")
    larger_is_better: bool
    negligible: float = Field(ge=0.0, description="a difference below this makes no claim")
    resolution: float = Field(ge=0.0, description="the step in which sums carry the metric")
    definition: str

    @property
    def decimals(self) -> int:
        """As many as show a difference that is not negligible."""
        if not 0.0 < self.negligible < 1.0:
            return 0 if self.negligible >= 1.0 else _MOST_DECIMALS
        return min(_MOST_DECIMALS, math.ceil(-math.log10(self.negligible) - 1e-9))

    @property
    def heading(self) -> str:
        """`PSNR (dB)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def direction(self) -> str:
        """`higher is better` or `lower is better`."""
        return f"{'higher' if self.larger_is_better else 'lower'} is better"

    def show(self, value: float) -> str:
        """The value, rounded, without its unit."""
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
        return self.printed(value - reference)

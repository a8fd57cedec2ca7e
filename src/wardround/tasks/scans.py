"""Batches of scans, each with the operator that measured it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.acquisition.wrapped import Prompted
from wardround.tasks.classical import Method


@dataclass(frozen=True, eq=False)
class Scans:
    """Slices that one operator measured: data (B, *data_shape); target (what was scanned) and body (1 inside), each
    float32 (B, H, W); prompt (B, tokens, dimension) where the network takes one and the site has it.
    """

    operator: LinearOperator
    data: Tensor
    target: Tensor
    body: Tensor
    prompt: Tensor | None = None

    def __len__(self) -> int:
        return self.target.shape[0]

    def alone(self, i: int) -> Scans:
        """The i-th slice by itself."""
        return self.part(i, i + 1)

    def part(self, start: int, stop: int) -> Scans:
        """The slices from `start` to before `stop`."""
        here = slice(start, stop)
        prompt = None if self.prompt is None else self.prompt[here]
        return Scans(self.operator, self.data[here], self.target[here], self.body[here], prompt)

    @property
    def prompted(self) -> LinearOperator:
        """The operator as a network sees it: with the prompt."""
        return self.operator if self.prompt is None else Prompted(self.operator, self.prompt)

    def joins(self, other: Scans) -> bool:
        """Whether both are of one operator and, if prompted, have as many tokens: one part can hold them."""
        shapes = [None if scans.prompt is None else scans.prompt.shape[1:] for scans in (self, other)]
        return self.operator is other.operator and shapes[0] == shapes[1]


@dataclass(frozen=True, eq=False)
class ScansBatch:
    """Slices of one operator or several, whose data may differ in shape: one part for each run of one operator."""

    parts: tuple[Scans, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def target(self) -> Tensor:
        """What was scanned: float32 (B, H, W)."""
        return torch.cat([part.target for part in self.parts])

    @cached_property
    def body(self) -> Tensor:
        """1 inside what is imaged: float32 (B, H, W)."""
        return torch.cat([part.body for part in self.parts])

    def part(self, start: int, stop: int) -> ScansBatch:
        """The slices from `start` to before `stop`, which may lie in several parts."""
        found, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, len(part))
            if low < high:
                found.append(part.part(low, high))
            first += len(part)
        return ScansBatch(tuple(found))

    def images(self, method: Method) -> Tensor:
        """What a method makes of each part: (B, H, W)."""
        return torch.cat([method(part.prompted, part.data) for part in self.parts])

    @classmethod
    def joined(cls, batches: Sequence[ScansBatch]) -> ScansBatch:
        """One batch of all slices, in order; neighbours of one operator become one part."""
        runs: list[list[Scans]] = []
        for part in (part for batch in batches for part in batch.parts):
            if runs and runs[-1][0].joins(part):
                runs[-1].append(part)
            else:
                runs.append([part])
        return cls(tuple(run[0] if len(run) == 1 else _one_part(run) for run in runs))


def _one_part(parts: Sequence[Scans]) -> Scans:
    data, target, body = (torch.cat([getattr(p, name) for p in parts]) for name in ("data", "target", "body"))
    prompts = [part.prompt for part in parts if part.prompt is not None]
    return Scans(parts[0].operator, data, target, body, torch.cat(prompts) if prompts else None)

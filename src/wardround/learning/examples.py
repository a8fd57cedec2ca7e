"""Which training examples a site processes in a round, and in how many steps: the same in every arm. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from wardround.study.schema import Local
from wardround.wire.random import public_generator


class ExampleStream:
    """An endless shuffled pass over a site's training examples; round r reads its own stretch of it.

    So what a site processes depends on its name, the seed and the round, and not on the arm.
    """

    def __init__(self, size: int, seed: int, site: str) -> None:
        self._size, self._seed, self._site = size, seed, site

    def __len__(self) -> int:
        return self._size

    def take(self, start: int, count: int) -> list[int]:
        """The examples at positions [start, start + count)."""
        taken: list[int] = []
        position = start
        while len(taken) < count:
            epoch, offset = divmod(position, self._size)
            order = public_generator(self._seed, self._site, epoch, "shuffle").permutation(self._size)
            part = order[offset : offset + count - len(taken)]
            taken.extend(int(i) for i in part)
            position += len(part)
        return taken


class Examples(Protocol):
    """Which examples a site processes in a round, in order."""

    def steps(self, local: Local) -> int:
        """How many steps a round has."""
        ...

    def of_round(self, number: int, per_round: int) -> list[int]:
        """The indices of round `number` (from 1)."""
        ...


@dataclass(frozen=True)
class SiteExamples:
    """One site's stretch of its own stream."""

    stream: ExampleStream

    def steps(self, local: Local) -> int:
        """Those of the study, or as many as its passes over the site's examples take."""
        return local.steps_of(len(self.stream))

    def of_round(self, number: int, per_round: int) -> list[int]:
        """The indices of round `number`."""
        return self.stream.take((number - 1) * per_round, per_round)


@dataclass(frozen=True)
class UnionExamples:
    """What all sites process in a round, shuffled together: the pooled arm.

    `stretches` are the numbers of examples that each site processes, where a round is a number of passes; without them
    all process alike many.
    """

    streams: tuple[ExampleStream, ...]
    offsets: tuple[int, ...]
    seed: int
    stretches: tuple[int, ...] = ()

    def steps(self, local: Local) -> int:
        """Those of the study; with passes as many of the arm's batches as what all sites process fills."""
        return -(-sum(self.stretches) // local.batch) if self.stretches else local.steps

    def of_round(self, number: int, per_round: int) -> list[int]:
        """The indices of round `number`; `per_round` counts all sites together.

        Where sites process fewer, the first ones come once more: the last batch is as large as the others.
        """
        stretches = self.stretches or (per_round // len(self.streams),) * len(self.streams)
        union = [
            offset + index
            for stream, offset, each in zip(self.streams, self.offsets, stretches, strict=True)
            for index in stream.take((number - 1) * each, each)
        ]
        public_generator(self.seed, "pooled", number, "shuffle").shuffle(union)
        return [*union, *union[: per_round - len(union)]]

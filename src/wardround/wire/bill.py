"""The communication bill: bytes of messages by what they hold, header and body as the wire has them.

kind           what
base           values that the study never changes; sites have them, so it is 0 unless something is wrong
model          shared values of the model, and what a method sends beside them
adapters       what the study's adapters add to a network, what is folded, and the group `adapters`
metrics        sums of losses, seconds and metrics, and a site's results
side_channels  groups that a method declares to be one (`Method.side_channel`)
other          headers, scales, weights, counts, and the keys and shares of a secure sum
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeAlias

from wardround.errors import WireError
from wardround.wire.canonical import parse_json
from wardround.wire.ring import Ring
from wardround.wire.sparse import Encoding
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import TAIL, Layout

Kind: TypeAlias = Literal["base", "model", "adapters", "metrics", "side_channels", "other"]
#: The group whose tensors are adapters whatever their names.
ADAPTERS = "adapters"


@dataclass(frozen=True)
class Sizes:
    """Bytes in one direction, by kind."""

    base: int = 0
    model: int = 0
    adapters: int = 0
    metrics: int = 0
    side_channels: int = 0
    other: int = 0

    def __add__(self, more: Sizes) -> Sizes:
        return Sizes(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(Sizes)))

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(getattr(self, f.name) for f in fields(Sizes))


NOTHING = Sizes()


@dataclass(frozen=True)
class Bill:
    """Bytes from the sites (`up`) and to the sites (`down`)."""

    up: Sizes = NOTHING
    down: Sizes = NOTHING

    def __add__(self, more: Bill) -> Bill:
        return Bill(self.up + more.up, self.down + more.down)

    @staticmethod
    def from_json(value: Mapping[str, Mapping[str, int]]) -> Bill:
        """The bill from `dataclasses.asdict`."""
        return Bill(Sizes(**value["up"]), Sizes(**value["down"]))


NO_BILL = Bill()


@dataclass(frozen=True)
class Kinds:
    """What is needed to tell the kind of a tensor: names of the base and of adapters, groups that are side channels."""

    base: frozenset[str] = frozenset()
    side_channels: frozenset[str] = frozenset()
    adapters: frozenset[str] = frozenset()

    def of(self, name: str) -> Kind:
        """The kind of a tensor by its name in the model, or by `GROUP/NAME` or `GROUP/NAME/PART` in a round's state."""
        group, slash, inner = name.partition("/")
        if not slash:
            group, inner = "", name
        if inner in self.base:
            return "base"
        if group in self.side_channels:
            return "side_channels"
        return "adapters" if group == ADAPTERS or inner.partition("/")[0] in self.adapters else "model"

    def of_table(self, table: Iterable[TensorInfo]) -> Sizes:
        """Bytes of tensors that follow one another."""
        return self._sizes((info.name, info.nbytes) for info in table)

    def of_update(self, layout: Layout, form: Encoding) -> Sizes:
        """Bytes of an update: its groups, then the metrics, weights and counts of its tail."""
        values = self._sizes(
            (f"{group.name}/{info.name}", form.tensor_nbytes(group, info, Ring(group.ring_bits)))
            for group in layout.groups
            for info in group.tensors
        )
        digits = (m.size * -(-m.largest.bit_length() // layout.digit_bits) for m in layout.metrics)
        metrics = Sizes(metrics=sum(digits) * TAIL.itemsize)
        return values + metrics + Sizes(other=form.nbytes(layout) - values.total - metrics.total)

    def of_file(self, path: Path) -> Sizes:
        """Bytes of a .safetensors file by its own table; raises `OSError`, and `WireError` for another file."""
        with path.open("rb") as file:
            table = parse_json(file.read(int.from_bytes(file.read(8), "little")))
        if not isinstance(table, dict):
            raise WireError("the file holds no table of tensors")
        offsets = {name: row["data_offsets"] for name, row in table.items() if name != "__metadata__"}
        values = self._sizes((name, end - start) for name, (start, end) in offsets.items())
        return values + Sizes(other=path.stat().st_size - values.total)

    def _sizes(self, tensors: Iterable[tuple[str, int]]) -> Sizes:
        found: Counter[str] = Counter()
        for name, nbytes in tensors:
            found[self.of(name)] += nbytes
        return Sizes(**found)


PLAIN_KINDS = Kinds()

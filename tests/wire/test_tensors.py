"""Tensors of other mappings: read when they are asked for, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from wardround.wire.tensors import Array, Chosen, joined


class Noting(Mapping[str, Array]):
    """A mapping that notes what is read of it."""

    def __init__(self, names: str) -> None:
        self.names, self.read = names, ""

    def __getitem__(self, name: str) -> Array:
        self.read += name
        return np.array([ord(name)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_what_is_chosen_is_read_when_it_is_asked_for_under_its_own_name() -> None:
    source = Noting("abc")
    chosen = Chosen({"first": (source, "b"), "second": (source, "a")})
    assert list(chosen) == ["first", "second"]
    assert len(chosen) == 2
    assert "b" not in chosen
    assert source.read == ""
    assert chosen["second"] == ord("a")
    assert source.read == "a"


def test_of_two_values_of_a_name_the_last_counts_and_the_other_is_not_read() -> None:
    first, last = Noting("ab"), Noting("bc")
    both = joined(first, last)
    assert list(both) == ["a", "b", "c"]
    assert not first.read
    assert not last.read
    assert {name: int(value[0]) for name, value in both.items()} == {name: ord(name) for name in "abc"}
    assert (first.read, last.read) == ("a", "bc")

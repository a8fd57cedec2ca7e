"""The values of a model in a file: the same bits, and little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from wardround.errors import WardroundError
from wardround.learning.laid_aside import LaidAside, lay_down


class Parts(nn.Module):
    """Every kind of value: large, of 16 bits, of no size, of one number, twice under two names, a buffer of bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.large = nn.Parameter(torch.randn(5, 1 << 20))
        self.turned = nn.Parameter(torch.randn(3, 7).T)
        self.narrow = nn.Parameter(torch.randn(3).bfloat16())
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.one = nn.Parameter(torch.tensor(2.5))
        self.same = self.one
        self.register_buffer("bits", torch.tensor([True, False, True]))


def is_in_a_deleted_file(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is that of a file which has no name any more."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_ = line.split()
        first, last = (int(part, 16) for part in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith("(deleted)")
    return False


def test_values_are_the_same_and_stay_in_a_file_without_a_name(tmp_path: Path) -> None:
    model, other = Parts(), Parts()
    aside = LaidAside(model.state_dict(), tmp_path)
    lay_down(model, aside.values)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        for name, tensor in other.state_dict().items():
            assert torch.equal(aside.values[name], tensor)
            assert aside.values[name].dtype == tensor.dtype
            assert torch.equal(model.state_dict()[name], tensor)
        aside.rest()
    # 20 MB went to the file, which the model reads too.
    assert is_in_a_deleted_file(aside.values["large"])
    assert is_in_a_deleted_file(model.large)
    assert not is_in_a_deleted_file(other.large)
    assert model.same is model.one


def test_values_of_a_small_model_are_copies_in_memory(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    aside = LaidAside(model.state_dict(), tmp_path / "no such folder")
    assert torch.equal(aside.values["weight"], model.weight)
    assert aside.values["weight"].data_ptr() != model.weight.data_ptr()
    aside.rest()


def test_a_model_that_trains_leaves_its_first_values_alone(tmp_path: Path) -> None:
    model, other = Parts(), Parts()
    aside = LaidAside(model.state_dict(), tmp_path)
    with torch.no_grad():
        model.large += 1.0
    assert torch.equal(aside.values["large"], other.large)


def test_a_disk_that_refuses_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(WardroundError, match="the disk refuses the model's first values"):
        LaidAside(Parts().state_dict(), tmp_path / "no such folder")

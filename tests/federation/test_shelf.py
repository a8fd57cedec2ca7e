"""What a frozen encoder gives of a site's images: kept between processes, sealed as the store is, known by content."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from wardround.errors import DataError
from wardround.models.lead import Lead
from wardround.site.shelf import FOLDER, Shelf, check_disk
from wardround.storage.cipher import StoreCipher

KEY, OTHER_KEY = b"\x01" * 32, b"\x02" * 32
SHAPE = (4, 3, 3)


def shelf(
    root: Path, *, key: bytes | None = None, base: str = "ab", count: int = 3, beside: Path | None = None
) -> Shelf:
    places = [(folder, StoreCipher.of(key)) for folder in (root, beside) if folder is not None]
    return Shelf("A", SHAPE, base, count, places)


class Doubling(nn.Module):
    """Gives (B, *SHAPE) of images (B, 1), and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.factor * x.reshape(-1, 1, 1, 1).expand(-1, *SHAPE)


@pytest.mark.parametrize("key", [None, KEY])
def test_another_process_finds_what_the_first_one_made(tmp_path: Path, key: bytes | None) -> None:
    images = torch.arange(3.0).reshape(3, 1)
    given, seen = [], []
    for _ in range(2):
        layer = Doubling()
        lead = Lead([layer], capacity=0)
        lead.shelf = shelf(tmp_path, key=key, base=lead.base)
        given += [lead(images), lead(images.flip(0)).flip(0)]
        seen.append(layer.seen)
    assert seen == [3, 0]
    assert all(torch.equal(one, given[0]) for one in given)
    assert torch.equal(given[0][:, 0, 0, 0], 2.0 * images[:, 0])


def test_of_other_values_of_the_encoder_nothing_is_found() -> None:
    bases = set()
    for value in (2.0, 3.0):
        layer = Doubling()
        nn.init.constant_(layer.factor, value)
        bases.add(Lead([layer]).base)
    assert len(bases) == 2


def test_a_sealed_shelf_holds_nothing_that_can_be_read(tmp_path: Path) -> None:
    value = torch.full((1, *SHAPE), 1.5)
    kept = shelf(tmp_path, key=KEY)
    kept.put(b"k", value)
    (path,) = kept.folder.iterdir()
    assert value.numpy().tobytes()[:16] not in path.read_bytes()
    assert torch.equal(kept.get(b"k"), value)  # type: ignore[arg-type]
    assert shelf(tmp_path, key=OTHER_KEY).get(b"k") is None
    assert shelf(tmp_path, key=KEY, base="cd").get(b"k") is None


@pytest.mark.parametrize("key", [None, KEY])
def test_what_changed_on_the_disk_is_made_anew(tmp_path: Path, key: bytes | None) -> None:
    kept = shelf(tmp_path, key=key)
    kept.put(b"k", torch.ones(1, *SHAPE))
    (path,) = kept.folder.iterdir()
    whole = bytearray(path.read_bytes())
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        assert kept.get(b"k") is None
    kept.put(b"k", torch.ones(1, *SHAPE))
    assert kept.get(b"k") is not None


def test_where_data_are_pooled_what_the_sites_have_is_read(tmp_path: Path) -> None:
    shelf(tmp_path / "A").put(b"k", torch.ones(1, *SHAPE))
    pooled = shelf(tmp_path / "pooled", beside=tmp_path / "A")
    assert pooled.get(b"k") is not None
    pooled.put(b"l", torch.ones(1, *SHAPE))
    assert [path.parent for path in (tmp_path / "pooled").rglob(b"l".hex())] == [tmp_path / "pooled" / FOLDER / "ab"]


def test_shelves_that_do_not_fit_together_are_one_error_without_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = shelf(tmp_path, count=10).needed
    assert needed == 10 * (32 + 4 * 36)
    free = 2**28 + needed + needed // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    one, other = (shelf(tmp_path / name, count=10) for name in "AB")
    check_disk([])
    check_disk([one])
    with pytest.raises(DataError, match=r"^site A: the disk is too small .* make room on it") as error:
        check_disk([one, other])
    assert not any(character.isdigit() for character in str(error.value))
    assert not list(tmp_path.iterdir())
    for number in range(10):
        one.put(bytes([number]), torch.ones(1, *SHAPE))
    assert shelf(tmp_path / "A", count=10).needed == 0
    check_disk([shelf(tmp_path / "A", count=10), other])

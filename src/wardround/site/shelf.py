"""What a frozen encoder gave of a site's images, kept on its disk: it is slow to make and too much for memory.

It is known by the image as the network sees it, so by the data and their preparation, and by the hash of the encoder's
values. It is sealed as the site's store is, for a network could make an image of it.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor, nn

from wardround.errors import DataError, JournalError
from wardround.models.lead import Embedding
from wardround.storage.blobs import disk_error
from wardround.storage.cipher import StoreCipher, sealed_nbytes
from wardround.tasks.task import Counted, Dataset
from wardround.wire.files import written
from wardround.wire.host import on_host

FOLDER = "embeddings"
_DIGEST = 32
# What a disk keeps free for everything else that a run writes.
_SPARE = 2**28
# Where they are once patients withdrew: a folder for each number of them.
_AFTER = "after-withdrawal-"
# A folder of a site's run, and what seals its files.
Place = tuple[Path, StoreCipher | None]


class Shelf:
    """Embeddings of the images of one site, by an encoder whose values have the hash `base`.

    The first of `places` is where they are written; they may be found in the others too. `count`: how many images there
    are at most. Implements `wardround.models.lead.Keeping`.
    """

    def __init__(self, site: str, shape: Sequence[int], base: str, count: int, places: Sequence[Place]) -> None:
        self.site = site
        self._shape = (1, *shape)
        self._places = [(folder / FOLDER / base, cipher) for folder, cipher in places]
        plain = _DIGEST + 4 * math.prod(shape)
        each = plain if self._places[0][1] is None else sealed_nbytes(plain)
        self._lacking = max(0, count - sum(1 for _ in self.folder.glob("*"))) * each

    @property
    def folder(self) -> Path:
        """Where the files are written."""
        return self._places[0][0]

    @property
    def needed(self) -> int:
        """Bytes that were still to be written when it was opened."""
        return self._lacking

    def get(self, key: bytes) -> Tensor | None:
        """The embedding (1, *shape) of an image; `None` where no file has it, or it changed on the disk."""
        for folder, cipher in self._places:
            path = folder / key.hex()
            try:
                found = path.read_bytes() if cipher is None else cipher.read(path)
            except (OSError, JournalError):
                continue
            if len(found) == _DIGEST + 4 * math.prod(self._shape) and found[:_DIGEST] == _digest(found[_DIGEST:]):
                values = np.frombuffer(bytearray(found[_DIGEST:]), np.float32)
                return torch.from_numpy(values).reshape(self._shape)
        return None

    def put(self, key: bytes, value: Tensor) -> None:
        """Keep the embedding of an image. Raises `JournalError` where the disk is full."""
        folder, cipher = self._places[0]
        data = np.ascontiguousarray(on_host(value), np.float32).tobytes()
        # Several processes may make the same one.
        draft = folder / f"{key.hex()}.{os.getpid()}"
        try:
            with written(draft) as file:
                sealing = file if cipher is None else cast("BinaryIO", cipher.writer(file))
                sealing.write(_digest(data))
                sealing.write(data)
                if cipher is not None:
                    sealing.close()
            draft.rename(folder / key.hex())
        except OSError as error:
            raise disk_error(error) from error


def _digest(data: bytes | bytearray) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def shelf_of(site: str, model: nn.Module, datasets: Iterable[Dataset], places: Sequence[Place]) -> Shelf | None:
    """The shelf of the images of some data sets; `None` for a network whose encoder is not frozen, or is quick.

    On another device than the CPU nothing is kept: the encoder is quick there.
    """
    if not isinstance(model, Embedding) or model.lead is None or len(model.lead) < len(model.layers()):
        return None
    counted = [dataset for dataset in datasets if isinstance(dataset, Counted)]
    if not counted or next(model.parameters()).device.type != "cpu":
        return None
    return Shelf(site, model.given_shape, model.lead.base, sum(d.pictures() for d in counted), places)


def shelf_folder(folder: Path, withdrawals: int) -> Path:
    """The folder of a site's run in which its shelf is, after so many patients withdrew."""
    return folder / f"{_AFTER}{withdrawals}" if withdrawals else folder


def clear_shelves(folder: Path, withdrawals: int | None = None) -> None:
    """Delete what a frozen encoder gave of images of before the last withdrawal, or all of it without a number.

    No file says whose image it is of, so all go: they are made again when they are needed. A process that was at work
    while a patient withdrew may still have written some, so a site looks whenever it opens its shelf.
    """
    kept = None if withdrawals is None else shelf_folder(folder, withdrawals)
    for place in (folder, *folder.glob(f"{_AFTER}*")):
        if place != kept:
            shutil.rmtree(place / FOLDER, ignore_errors=True)
            if place != folder:
                shutil.rmtree(place, ignore_errors=True)


def check_disk(shelves: Sequence[Shelf]) -> None:
    """Raise `DataError` where shelves of one disk have no room on it together; nothing was written then."""
    if not shelves:
        return
    folder = next(above for above in shelves[0].folder.absolute().parents if above.is_dir())
    needed, free = sum(shelf.needed for shelf in shelves), shutil.disk_usage(folder).free
    if needed and needed + _SPARE > free:
        # How much is needed says how many images there are: that stays at the site.
        raise DataError(
            f"site {shelves[0].site}: the disk is too small for what the frozen encoder gives of the images; make room "
            "on it, run into another folder, or lower task.slices",
            detail=f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
        )

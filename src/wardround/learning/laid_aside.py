"""The first values of a model in a file that has no name: memory holds what of them is being read."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wardround.errors import WardroundError
from wardround.wire.files import reason

#: Values begin at whole multiples of it, as a processor likes to read them.
_ALIGNED = 64
#: A model of fewer bytes stays where it is.
_SMALL = 16 << 20


class LaidAside:
    """Tensors in a file in `folder` that nothing else can open and that ends with the process: `values` are copies.

    What is written into these stays in memory, and so do few tensors, and all without a folder. Raises `WardroundError`
    where the disk refuses.
    """

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path | None) -> None:
        self._map: mmap.mmap | None = None
        if folder is None or sum(tensor.nbytes for tensor in tensors.values()) < _SMALL:
            self.values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            return
        try:
            self.values = self._moved(tensors, folder)
        except OSError as error:
            raise WardroundError(f"the disk refuses the model's first values: {reason(error)}") from error

    def _moved(self, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
        with tempfile.TemporaryFile(dir=folder) as file:
            offsets = {}
            for name, tensor in tensors.items():
                file.write(bytes(-file.tell() % _ALIGNED))
                offsets[name] = file.tell()
                if tensor.numel():
                    file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            # Written to by nobody, and yet writable, for torch knows no other values.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {
            name: torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=offsets[name]).reshape(
                tensor.shape
            )
            if tensor.numel()
            else tensor.detach().clone()
            for name, tensor in tensors.items()
        }

    def rest(self) -> None:
        """Let go of the memory of values that were read; they are read from the file when they are needed again."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def lay_down(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Let `values` be the model's own parameters and buffers, by their names, in a process that trains nothing."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = values[name]

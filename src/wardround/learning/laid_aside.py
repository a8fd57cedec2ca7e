"""Values of a model in a file that has no name, for a process that trains nothing: memory holds what is being read."""

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
    """The values of a model, moved into a file in `folder` that nothing else can open and that ends with the process.

    `values` are the model's own tensors; what is written into them stays in memory. Raises `WardroundError` where the
    disk refuses.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        state = model.state_dict(keep_vars=True)
        self._map: mmap.mmap | None = None
        if sum(tensor.nbytes for tensor in state.values()) >= _SMALL:
            try:
                self._move(state, folder)
            except OSError as error:
                raise WardroundError(f"the disk refuses the model's first values: {reason(error)}") from error
        self.values = {name: tensor.detach() for name, tensor in state.items()}

    def _move(self, state: Mapping[str, Tensor], folder: Path) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            offsets = {}
            for name, tensor in state.items():
                file.write(bytes(-file.tell() % _ALIGNED))
                offsets[name] = file.tell()
                if tensor.numel():
                    file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            # Written to by nobody, and yet writable, for torch knows no other values.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, tensor in state.items():
            if tensor.numel():
                flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=offsets[name])
                tensor.data = flat.reshape(tensor.shape)

    def rest(self) -> None:
        """Let go of the memory of values that were read; they are read from the file when they are needed again."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

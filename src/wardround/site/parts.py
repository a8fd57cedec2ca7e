"""The parts of broadcasts that a site keeps, so that they need not be sent again (`federation.parts`).

A part is a file that is named by the hash of its bytes, sealed like the rest of the store where that is. It may be lost
or changed at any time: whatever is not there as it was is asked for again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from wardround.errors import JournalError, Rejected, WardroundError
from wardround.storage.blobs import disk_error
from wardround.storage.cipher import StoreCipher, sealed_nbytes
from wardround.wire.files import refuse_links, written
from wardround.wire.message import Body, FileBody, Message, span_sha256
from wardround.wire.parts import spans

_WHOLE = "whole"


class Lacking(WardroundError):
    """A request leaves out parts that the site does not hold; `places` are those in the table of the request."""

    def __init__(self, places: list[int]) -> None:
        super().__init__("the request leaves out parts that this site does not hold")
        self.places = places


class KeptParts:
    """A folder of parts. Raises `JournalError` for a symbolic link in its place."""

    def __init__(self, folder: Path, cipher: StoreCipher | None = None) -> None:
        refuse_links(folder)
        self._folder = folder
        self._cipher = cipher

    @contextmanager
    def whole(self, request: Message) -> Iterator[Message]:
        """The request with its whole body, for as long as the context lasts.

        Raises `Lacking` for what the site does not hold, and `Rejected` where header and body do not fit. That the
        whole has the hash that its header says is for its reader to check.
        """
        header = request.header
        if not header.absent:
            yield request
            return
        if sum(info.nbytes for info in header.tensors) != header.body_nbytes or not header.tensors:
            raise Rejected("the tensor table does not fit the body")
        if request.body.nbytes != header.sent_nbytes:
            raise Rejected(f"{request.body.nbytes} bytes of a body where the header says {header.sent_nbytes}")
        absent = {part.index: part.sha256 for part in header.absent}
        sizes = {index: header.tensors[index].nbytes for index in absent}
        if missing := [index for index, sha256 in absent.items() if not self._holds(sha256, sizes[index])]:
            raise Lacking(missing)
        path = self._folder / _WHOLE
        try:
            try:
                with written(path) as file:
                    self._join(request, absent, file)
            except OSError as error:
                raise disk_error(error) from error
            yield Message(replace(header, absent=()), FileBody(path, header.body_nbytes))
        finally:
            path.unlink(missing_ok=True)

    def keep(self, request: Message, places: frozenset[int]) -> None:
        """Keep these tensors of a whole request, by their places in its table, and nothing else."""
        if not places:
            self.clear()
            return
        assert isinstance(request.body, FileBody)
        where, path = spans(request.header.tensors), request.body.path
        try:
            found = {span_sha256(path, *where[place]): where[place] for place in sorted(places)}
            self._drop({*found, _WHOLE})
            for sha256, (begin, end) in found.items():
                if not (self._folder / sha256).exists():
                    self._write(sha256, FileBody(path, end).chunks(begin))
        except OSError as error:
            raise disk_error(error) from error

    def clear(self) -> None:
        """Keep nothing."""
        self._drop(())

    def _join(self, request: Message, absent: Mapping[int, str], file: BinaryIO) -> None:
        """Write what came and what is held, in the order of the table."""
        came, at = request.body, 0
        for index, info in enumerate(request.header.tensors):
            if index not in absent:
                _copy(came, at, info.nbytes, file)
                at += info.nbytes
            elif (data := self._read(absent[index])) is not None:
                file.write(data)
            else:
                raise Lacking([index])

    def _holds(self, sha256: str, nbytes: int) -> bool:
        path = self._folder / sha256
        expected = nbytes if self._cipher is None else sealed_nbytes(nbytes)
        return not path.is_symlink() and path.is_file() and path.stat().st_size == expected

    def _read(self, sha256: str) -> bytes | bytearray | None:
        """The bytes of a part; nothing, and no file any more, where they are others than they were."""
        path = self._folder / sha256
        with suppress(OSError, JournalError):
            data = path.read_bytes() if self._cipher is None else self._cipher.read(path)
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        path.unlink(missing_ok=True)
        return None

    def _write(self, sha256: str, chunks: Iterator[memoryview]) -> None:
        with written(self._folder / sha256) as file:
            sealing = None if self._cipher is None else self._cipher.writer(file)
            for chunk in chunks:
                (file if sealing is None else sealing).write(chunk)
            if sealing is not None:
                sealing.close()

    def _drop(self, but: Collection[str]) -> None:
        """Delete every other part, and what a process that was killed left."""
        with suppress(FileNotFoundError):
            for name in os.listdir(self._folder):
                if name not in but:
                    (self._folder / name).unlink()


def _copy(body: Body, begin: int, nbytes: int, file: BinaryIO) -> None:
    """Copy a span of a body into a file."""
    left = nbytes
    for chunk in body.chunks(begin) if nbytes else ():
        left -= file.write(chunk[:left])
        if not left:
            return

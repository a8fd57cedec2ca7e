"""What the worker processes of the engines' tests run: it needs no torch, so that they start at once."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wardround.errors import DataError
from wardround.wire.message import Header, Message


class Echo:
    """A site that says which process it lives in, and dies when told to, as often as its file says."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._deaths = Path(spec["deaths"])

    def handle(self, request: Message) -> Message:
        print("a library that prints")
        order = request.header.meta.get("order")
        if order == "die":
            left = int(self._deaths.read_text())
            self._deaths.write_text(str(left - 1))
            if left > 0:
                os._exit(3)
        if order == "warn":
            warnings.warn("/data/DOE^JANE.dcm: (0010,0010) is odd", stacklevel=1)
            logging.getLogger("library").warning("/data/DOE^JANE.dcm is odd")
        if order == "sleep":
            time.sleep(60)
        return request.reply("echo", meta={"pid": os.getpid()})


def finder(spec: dict[str, Any], progress: Any) -> Callable[[Header], Echo]:
    """The factory of the workers of these tests."""
    if spec.get("broken"):
        raise ValueError("/data/DOE^JANE.nii is no specification")
    echo = Echo(spec)

    def find(header: Header) -> Echo:
        if header.meta.get("order") == "fail":
            raise DataError("an image cannot be read", detail="/data/DOE^JANE.nii")
        progress(header.study, header.site, header.round, 1, 1)
        return echo

    return find

"""The one door to Opacus, which sets up logging for the whole program when it is imported."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

from wardround.errors import MissingExtra

EXTRA = "privacy"


def from_opacus(module: str, name: str, what: str) -> Any:
    """`name` of a module of Opacus, imported without a trace in the root logger.

    `what` needs it. Raises `MissingExtra` where Opacus is not installed.
    """
    root, guard = logging.getLogger(), logging.NullHandler()
    # `logging.basicConfig` leaves a root logger that has a handler alone. Left to itself it would add one, and every
    # line that a program logs through a handler of its own would then be printed twice.
    root.addHandler(guard)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(module), name)
    except ImportError:
        raise MissingExtra(what, EXTRA) from None
    finally:
        root.removeHandler(guard)

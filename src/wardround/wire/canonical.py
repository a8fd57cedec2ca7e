"""Canonical JSON: one byte sequence for one value, so that it can be hashed and signed."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from wardround.errors import WireError

MAX_DEPTH = 16
# Commas and colons: a model of twenty thousand tensors has fewer. A parsed value takes fifty times its bytes of memory
# where they are many short keys; so four million bytes of them are refused unread.
MAX_MARKS = 1 << 18
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_json(value: Any) -> bytes:
    """Serialise `value` with sorted keys, no spaces and ASCII only; NaN and infinity are refused.

    Raises `ValueError` for NaN or infinity and `TypeError` for anything JSON cannot hold.
    """
    return _ENCODER.encode(value).encode()


def parse_json(data: bytes | str) -> Any:
    """Parse JSON from the outside.

    Raises `WireError` for duplicate keys, NaN, infinity, nesting deeper than 16 and more than 2^18 commas and colons.
    """
    text = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    if text.count(b",") + text.count(b":") > MAX_MARKS:
        raise WireError("a header holds too many values")
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a header is not JSON: {type(error).__name__}") from None
    if _depth(value, MAX_DEPTH) > MAX_DEPTH:
        raise WireError(f"a header is nested deeper than {MAX_DEPTH} levels")
    return value


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _finite(text: str) -> float:
    # 1e999 is written as a number and read as infinity.
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("infinity")
    return value


def _depth(value: Any, limit: int) -> int:
    if limit < 0:
        return 1
    if isinstance(value, dict):
        return 1 + max((_depth(v, limit - 1) for v in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((_depth(v, limit - 1) for v in value), default=0)
    return 0

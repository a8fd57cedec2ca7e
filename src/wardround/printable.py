"""Text of others as it may be shown on a terminal or in a log."""

from __future__ import annotations

import re
import unicodedata

_MARK = "\ufffd"
_LINES = re.compile(r"[\u0085\u2028\u2029\x0b\x0c\x1c-\x1e]|\r\n?")
_PLAIN = frozenset("\n\t")
# Controls, what turns the direction of text or is not seen, surrogates, and what no font has.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn"))


def printable(text: str) -> str:
    """The text without what a terminal obeys or an eye does not see; a mark stands in its place.

    A study's description that hides or overwrites lines of its own review would be approved for what it does not say.
    """
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    text = _LINES.sub(" ", text)
    return "".join(c if c in _PLAIN or unicodedata.category(c) not in _HIDDEN else _MARK for c in text)

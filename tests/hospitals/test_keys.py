"""Keys in files and as people read them out, and how long ahead a certificate's end is said."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from wardround.errors import WardroundError
from wardround.hospitals.expiry import days_left, urgency, warning
from wardround.hospitals.keys import fingerprint, make_key, open_to_others, public_key, read_key

NOW = datetime(2030, 5, 1, tzinfo=UTC)


@dataclass(frozen=True)
class _Span:
    not_before: datetime
    not_after: datetime


def _ends(**left: float) -> _Span:
    return _Span(NOW - timedelta(days=300), NOW + timedelta(**left))


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    before = os.umask(0)
    try:
        made = make_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not open_to_others(path)
    assert read_key(path).public == made.public
    with pytest.raises(WardroundError, match="never overwritten"):
        make_key(path)
    assert read_key(path).public == made.public
    path.chmod(0o640)
    assert open_to_others(path)


def test_a_link_in_the_place_of_a_key_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "identity.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WardroundError):
        make_key(tmp_path / "identity.key")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("text", ["", "00", "zz" * 32, "00" * 33, "00" * 32 + "\n\n"])
def test_a_damaged_key_is_said_and_not_printed(text: str, tmp_path: Path) -> None:
    (tmp_path / "identity.key").write_text(text)
    with pytest.raises(WardroundError, match="not a key of 32 bytes") as raised:
        read_key(tmp_path / "identity.key")
    assert "zz" not in str(raised.value)
    with pytest.raises(WardroundError, match="No such file"):
        read_key(tmp_path / "absent.key")


def test_a_key_is_read_as_people_write_it() -> None:
    key = bytes(range(32))
    digits = key.hex()
    pairs = [digits[n : n + 2] for n in range(0, 64, 2)]
    for text in (digits, digits.upper(), " ".join(pairs), ":".join(pairs), f"  {digits[:8]}-{digits[8:]}\n"):
        assert public_key(text) == key
    for text in ("", digits[:-1], digits + "0", "0x" + digits, "g" * 64):
        with pytest.raises(WardroundError, match="64 digits"):
            public_key(text)


def test_words_are_the_published_code_and_differ_for_every_key() -> None:
    from wardround.hospitals import keys

    # The examples of arXiv:0901.4016: 127.0.0.1 and 63.84.220.193.
    assert [keys._word(n) for n in (0x7F00, 0x0001, 0x3F54, 0xDCC1)] == ["lusab", "babad", "gutih", "tugad"]
    seen = {fingerprint(bytes([n]) * 32) for n in range(50)}
    assert len(seen) == 50
    consonant = "[bdfghjklmnprstvz]"
    word = f"{consonant}[aiou]{consonant}[aiou]{consonant}"
    assert all(re.fullmatch(f"({word} ?){{8}}", words) for words in seen)


def test_an_end_is_said_30_7_and_1_days_ahead() -> None:
    assert warning(_ends(days=31), NOW) is None
    assert urgency(_ends(days=31), NOW) == "none"
    texts = []
    for days, how, words in ((29, "soon", "30 days"), (6.5, "urgent", "7 days"), (0.5, "urgent", "one day")):
        found = warning(_ends(days=days), NOW)
        assert found is not None
        assert f"within {words}" in found
        assert urgency(_ends(days=days), NOW) == how
        assert days_left(_ends(days=days), NOW) == days
        texts.append(found)
    over = warning(_ends(days=-1), NOW)
    assert over is not None
    assert "ended on 2030-04-30" in over
    assert urgency(_ends(days=-1), NOW) == "over"
    # Within a step the text stays, so that a log says it once.
    assert warning(_ends(days=20), NOW + timedelta(0)) != texts[1]
    end = _ends(days=29)
    assert warning(end, NOW) == warning(end, NOW + timedelta(days=5))

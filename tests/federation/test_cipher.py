"""What a site keeps can be sealed, opens with its key alone, and changes no result."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.toys import toy_sites, toy_study
from wardround.errors import JournalError, StudyError
from wardround.runs.session import Result, run
from wardround.storage.cipher import CHUNK, StoreCipher, sealed_nbytes
from wardround.storage.store import Memory, SiteStore
from wardround.study.sites import SitesFile, load_sites
from wardround.wire.message import Header, Message

KEY, OTHER = bytes(range(32)), bytes(32)
PRIVATE = {
    "method": {"kind": "fedbn"},
    "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
    "local": {"steps": 2, "batch": 2, "optimizer": "adam", "lr": 0.02, "optimizer_state": "keep"},
    "schedule": {"rounds": 2, "min_sites": 3},
}


@given(sizes=st.lists(st.sampled_from([0, 1, 17, CHUNK - 1, CHUNK, CHUNK + 1]), min_size=1, max_size=3))
def test_files_come_back_whatever_their_size(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    path = tmp_path_factory.mktemp("vault") / "file"
    parts = [np.random.default_rng(n).bytes(n) for n in sizes]
    with path.open("wb") as file:
        sealing = StoreCipher(KEY).writer(file)
        for part in parts:
            sealing.write(part)
        sealing.close()
    assert StoreCipher(KEY).read(path) == b"".join(parts)
    assert path.stat().st_size == sealed_nbytes(sum(sizes))


def test_no_chunk_can_be_changed_moved_left_out_or_cut_off(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    sealing = StoreCipher(KEY).writer(buffer)
    sealing.write(bytes(3 * CHUNK))
    sealing.close()
    sealed, size = buffer.getvalue(), CHUNK + 16
    head, chunks = sealed[:7], [sealed[7 + i * size : 7 + (i + 1) * size] for i in range(3)]
    spoiled = [
        head + chunks[0] + chunks[1],
        head + chunks[1] + chunks[0] + chunks[2],
        head + chunks[0] + chunks[2],
        sealed[:-1],
        sealed[:50] + bytes([sealed[50] ^ 1]) + sealed[51:],
        b"",
    ]
    for data in spoiled:
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(JournalError, match="does not open"):
            StoreCipher(KEY).read(tmp_path / "file")
    (tmp_path / "file").write_bytes(sealed)
    with pytest.raises(JournalError, match="does not open"):
        StoreCipher(OTHER).read(tmp_path / "file")


def test_a_value_opens_under_its_own_name_only() -> None:
    cipher = StoreCipher(KEY)
    assert cipher.open(cipher.seal("word", "identity"), "identity") == "word"
    with pytest.raises(JournalError):
        cipher.open(cipher.seal("word", "identity"), "roster")
    assert repr(cipher) == "store's cipher(...)"


def test_a_sealed_store_shows_nothing_and_opens_with_its_key(tmp_path: Path) -> None:
    store = SiteStore(tmp_path, StoreCipher(KEY))
    store.set_fact("fingerprint", "FINGERPRINT")
    store.write_once("identity", 0, "PRIVATE-KEY")
    tensor = np.frombuffer(b"PRIVATE-TENSOR--" * 8, np.float32)
    request = Message(Header("train", "s", "A", 1))
    for _ in range(2):  # Sealed anew, the same memory is another file: the first must not stay behind.
        store.finish(request.reply("done"), Memory({"layer": tensor}, {"note": "PRIVATE-NOTE"}), set())
    memory = store.memory(1)
    assert memory.tensors["layer"].tobytes() == tensor.tobytes()
    assert memory.meta == {"note": "PRIVATE-NOTE"}
    assert len(list((tmp_path / "blobs").iterdir())) == 1
    store.close()
    raw = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(word in raw for word in (b"PRIVATE", b"FINGERPRINT"))
    again = SiteStore(tmp_path, StoreCipher(KEY))
    assert again.write_once("identity", 0, "another") == "PRIVATE-KEY"
    again.close()
    with pytest.raises(JournalError, match="does not open"):
        SiteStore(tmp_path, StoreCipher(OTHER))
    with pytest.raises(JournalError, match="no key was given"):
        SiteStore(tmp_path)


def test_a_clear_store_is_not_gone_on_with_under_a_key(tmp_path: Path) -> None:
    store = SiteStore(tmp_path)
    store.set_fact("fingerprint", "f")
    store.close()
    with pytest.raises(JournalError, match="begun without encryption"):
        SiteStore(tmp_path, StoreCipher(KEY))


def keyed(folder: Path, place: str | None) -> SitesFile:
    sites = toy_sites(folder)
    return SitesFile(
        sites={name: entry.model_copy(update={"encryption_key": place}) for name, entry in sites.sites.items()}
    ).with_code()


@pytest.mark.parametrize("secure", [False, True])
def test_a_run_under_keys_gives_the_same_bits_and_wants_the_same_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    study = toy_study(**PRIVATE, protection={"secure": secure})

    def go(name: str, place: str | None) -> Result:
        return run(study, keyed(tmp_path / "data", place), tmp_path / name, engine="local")

    monkeypatch.setenv("SITE_KEY", KEY.hex())
    clear, sealed = go("clear", None), go("sealed", "${SITE_KEY}")
    for key in ("model_sha256", "local_sha256", "metrics"):
        assert getattr(clear, key) == getattr(sealed, key)
    assert go("sealed", "${SITE_KEY}").model_sha256 == clear.model_sha256
    monkeypatch.setenv("SITE_KEY", OTHER.hex())
    with pytest.raises(JournalError, match="does not open"):
        go("sealed", "${SITE_KEY}")
    for path in (tmp_path / "sealed").rglob("*"):
        assert not path.is_file() or KEY.hex().encode() not in path.read_bytes()


def test_keys_are_found_or_the_file_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "A").mkdir()
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    path = tmp_path / "sites.yaml"

    def load(place: str) -> SitesFile:
        path.write_text(f"sites: {{A: {{data: A, encryption_key: '{place}'}}}}")
        return load_sites(path)

    monkeypatch.setenv("SITE_KEY", KEY.hex())
    assert load("key").key("A") == load("${SITE_KEY}").key("A") == KEY
    assert KEY.hex() not in load("${SITE_KEY}").model_dump_json()
    for place, words in (("${NO_SUCH_KEY}", "is not set"), ("nowhere", "cannot be read"), ("A.txt", "32 bytes")):
        (tmp_path / "A.txt").write_text("secret")
        with pytest.raises(StudyError, match=words) as error:
            load(place)
        assert "secret" not in str(error.value)

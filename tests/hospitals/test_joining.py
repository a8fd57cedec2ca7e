"""Joining: a kit becomes a folder or nothing does, a site keeps its key, and a hostile kit writes nowhere."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hospitals.stands import FEDERATION, ok, packed, refused, relisted, stand_up, tree, unpacked
from wardround.errors import Rejected, StudyError, WardroundError
from wardround.hospitals import certificates
from wardround.hospitals.certificates import check_certificates, issue, make_authority
from wardround.hospitals.federation import load_federation, save_federation
from wardround.hospitals.folders import CoordinatorFolder, SiteFolder
from wardround.hospitals.keys import fingerprint, make_key, read_key
from wardround.hospitals.membership import joining, kit_archive
from wardround.hospitals.membership.joining import join, site_of
from wardround.hospitals.membership.kit_archive import read_kit, write_kit
from wardround.hospitals.membership.kits import invite
from wardround.hospitals.membership.site_file import files_in, load_site


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_up(tmp_path_factory.mktemp("made"), "stroke", "Alpha", "Beta")


@pytest.fixture
def fed(made: Path, tmp_path: Path) -> Path:
    """A federation with two invited sites, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "fed"))


@pytest.fixture(scope="module")
def kit(made: Path) -> Path:
    return made / "kits" / "Alpha.zip"


# What joining makes -----------------------------------------------------------------------------------------------


def test_joining_makes_the_sites_folder_and_says_what_to_read_out(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = ok("site", "join", kit, "--systemd")
    folder = SiteFolder(Path("stroke"))
    key = read_key(folder.identity).public
    assert key.hex() in said.replace(" ", "")
    assert fingerprint(key) in said
    assert fingerprint(bytes.fromhex(load_federation(folder.federation).root_key)) in said
    assert "wardround site doctor stroke" in said
    assert site_of(folder) == "Alpha" == check_certificates(folder.certificates).name
    for path in (folder.identity, folder.certificates / "own.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700
    assert (folder.root / "wardround-site-stroke.service").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["stroke"]


def test_the_sites_file_is_to_be_filled_in_and_then_read(kit: Path, tmp_path: Path) -> None:
    folder = join(kit, tmp_path / "site").folder
    entry = yaml.safe_load(folder.site.read_text())["sites"]["Alpha"]
    assert entry["egress"]["minimum_cohort"] == 11
    with pytest.raises(StudyError, match=r"sites\.Alpha\.data: write the folder"):
        load_site(folder, "Alpha")
    (tmp_path / "data" / "p1").mkdir(parents=True)
    (tmp_path / "data" / "p1" / "scan.nii").write_text("x")
    text = folder.site.read_text().replace("/path/to/the/patients", "../data")
    folder.site.write_text(text)
    found = load_site(folder, "Alpha")
    assert found.data == (tmp_path / "data",)
    assert (found.ledger, found.history) == (folder.root / "ledger.jsonl", folder.root / "history")
    assert files_in(found.data) == (1, 1)
    # Each line that is a comment of a key is one that the schema knows.
    folder.site.write_text(text.replace("# memory", "memory").replace("# plugins", "plugins"))
    assert load_site(folder, "Alpha").memory == 16
    with pytest.raises(StudyError, match=r"one entry, `sites\.Beta`"):
        load_site(folder, "Beta")


def test_a_new_kit_renews_and_keeps_what_is_the_sites(fed: Path, tmp_path: Path) -> None:
    first = join(fed / "kits" / "Alpha.zip", tmp_path / "site")
    first.folder.site.write_text("mine")
    before = tree(first.folder.root)
    federation = load_federation(fed / "federation.yaml")
    save_federation(federation.model_copy(update={"host": "127.0.0.2"}), fed / "federation.yaml")
    invite(fed, "Alpha", days=700)
    said = ok("site", "join", fed / "kits" / "Alpha.zip", "--folder", tmp_path / "site")
    assert "renewed until" in said
    assert "as they were" in said
    after = tree(first.folder.root)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"certificates/own.crt", "certificates/own.key", "federation.yaml", "README.txt"} - {
        name for name in ("README.txt",) if after[name] == before[name]
    }
    assert load_federation(first.folder.federation).host == "127.0.0.2"
    assert check_certificates(first.folder.certificates).not_after > first.certificate.not_after
    assert sorted(after) == sorted(before)


def test_the_same_kit_again_mends_a_folder_and_never_touches_the_key(kit: Path, tmp_path: Path) -> None:
    first = join(kit, tmp_path / "site")
    before = tree(tmp_path / "site")
    (tmp_path / "site" / "certificates" / "own.key").write_text("damaged")
    again = join(kit, tmp_path / "site")
    assert (again.key, again.renewed, again.new_key) == (first.key, True, False)
    assert tree(tmp_path / "site") == before
    first.folder.identity.unlink()
    (tmp_path / "site" / "certificates" / "own.crt").unlink()
    said = ok("site", "join", kit, "--folder", tmp_path / "site")
    assert "Read to it your site's key" in said
    assert read_key(first.folder.identity).public != first.key
    assert stat.S_IMODE(first.folder.identity.stat().st_mode) == 0o600


# Folders that are not for this kit --------------------------------------------------------------------------------


def test_a_folder_of_another_federation_or_site_stays_as_it_is(fed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    join(fed / "kits" / "Alpha.zip", folder)
    before = tree(folder)
    heart = stand_up(tmp_path, "heart", "Alpha")
    twin = stand_up(tmp_path / "twin", "stroke", "Alpha")
    for kit, why in (
        (heart / "kits" / "Alpha.zip", "federation stroke, and the kit of heart"),
        (twin / "kits" / "Alpha.zip", "another root signed it"),
        (fed / "kits" / "Beta.zip", "of site Alpha, and the kit is for Beta"),
    ):
        assert why in " ".join(refused("site", "join", kit, "--folder", folder).split())
        assert tree(folder) == before


def test_an_older_kit_is_refused(fed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = shutil.copy(fed / "kits" / "Alpha.zip", tmp_path / "old.zip")
    later = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=30)
    monkeypatch.setattr(certificates, "_now", lambda: later)
    invite(fed, "Alpha")
    join(fed / "kits" / "Alpha.zip", tmp_path / "site")
    before = tree(tmp_path / "site")
    with pytest.raises(Rejected, match="is older than the one"):
        join(Path(old), tmp_path / "site")
    assert tree(tmp_path / "site") == before


def test_other_folders_are_not_written_into(kit: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("mine", "file", "link"):
        with pytest.raises(WardroundError):
            join(kit, tmp_path / name)
    assert not list((tmp_path / "empty").iterdir())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert join(kit, tmp_path / "empty").site == "Alpha"


@pytest.mark.parametrize("again", [False, True])
def test_a_full_disk_leaves_all_as_it_was(
    again: bool, fed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site"
    if again:
        join(fed / "kits" / "Alpha.zip", folder)
        invite(fed, "Alpha")
    before = tree(tmp_path)

    written: list[int] = []

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(joining.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        join(fed / "kits" / "Alpha.zip", folder)
    assert tree(tmp_path) == before
    assert folder.exists() == again


# Hostile kits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../evil.txt",
        "/etc/evil",
        "certificates/../../evil",
        "nvflare/../evil",
        "nvflare/startup/../../evil",
        "nvflare/custom/evil.py",
        "nvflare/startup/a/b",
        "nvflare/.hidden",
        "nvflare\\evil",
        "C:evil",
        "site.yaml",
        "identity.key",
        "roster.json",
        "stopped",
        "certificates/",
        "CERTIFICATES/own.key",
        "Federation.yaml",
    ],
)
def test_an_unexpected_name_is_refused(name: str, kit: Path, tmp_path: Path) -> None:
    box = tmp_path / "box"
    box.mkdir()
    hostile = packed(tmp_path / "kit.zip", {**unpacked(kit), name: b"x"})
    with pytest.raises(Rejected, match=r"a name that no kit has|two files of one name"):
        join(hostile, box / "site")
    assert not list(box.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box", "kit.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(kind: int, kit: Path, tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="a link or a folder"):
        join(packed(tmp_path / "kit.zip", unpacked(kit), mode=kind | 0o777), tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_what_would_fill_the_disk_is_refused_before_it_is_unpacked(kit: Path, tmp_path: Path) -> None:
    files = unpacked(kit)
    # A million zeros are a thousand bytes in the archive.
    bomb = packed(tmp_path / "bomb.zip", {**files, "nvflare/local/a": bytes((1 << 20) + 1)})
    with pytest.raises(Rejected, match="a file of the kit has more than"):
        join(bomb, tmp_path / "site")
    many = packed(tmp_path / "many.zip", {**files, **{f"nvflare/local/{n}": bytes(1 << 20) for n in range(9)}})
    with pytest.raises(Rejected, match="files have more than"):
        join(many, tmp_path / "site")
    crowd = packed(tmp_path / "crowd.zip", {**files, **{f"nvflare/local/{n}": b"" for n in range(200)}})
    with pytest.raises(Rejected, match="more than 100 files"):
        join(crowd, tmp_path / "site")
    with (tmp_path / "large.zip").open("wb") as file:
        file.truncate(kit_archive.LARGEST_ARCHIVE + 1)
    with pytest.raises(Rejected, match="more than 8,388,608 bytes"):
        join(tmp_path / "large.zip", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_size_that_lies_is_found_out(kit: Path, tmp_path: Path) -> None:
    """The directory of the archive says ten bytes, and a million come."""
    path = packed(tmp_path / "kit.zip", {**unpacked(kit), "nvflare/local/a": bytes(1_000_000)})
    data = bytearray(path.read_bytes())
    for place in range(len(data) - 4):
        if data[place : place + 4] == (1_000_000).to_bytes(4, "little"):
            data[place : place + 4] = (10).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(Rejected, match="damaged"):
        join(path, tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(kit: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(kit, tmp_path / "kit.zip"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("federation.yaml", b"name: other")
    with pytest.raises(Rejected, match="two files of one name"):
        join(path, tmp_path / "site")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_cut_archive_is_no_kit(share: float, kit: Path, tmp_path: Path) -> None:
    data = kit.read_bytes()
    (tmp_path / "kit.zip").write_bytes(data[: int(share * len(data))])
    assert "damaged" in refused("site", "join", tmp_path / "kit.zip", "--folder", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_flipped_byte_anywhere_never_joins_as_something_else(kit: Path, tmp_path: Path) -> None:
    data, whole = kit.read_bytes(), read_kit(kit)
    for place in range(0, len(data), 97):
        spoiled = bytearray(data)
        spoiled[place] ^= 0x41
        (tmp_path / "kit.zip").write_bytes(spoiled)
        try:
            found = read_kit(tmp_path / "kit.zip")
        except WardroundError:
            continue
        assert found == whole


def test_no_archive_is_said_plainly(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused("site", "join", tmp_path / "absent.zip")
    assert "cannot be read: Is a directory" in refused("site", "join", tmp_path)


@pytest.mark.parametrize("missing", ["kit.json", "federation.yaml", "certificates/own.key", "README.txt"])
def test_an_incomplete_kit_names_what_it_lacks(missing: str, kit: Path, tmp_path: Path) -> None:
    files = unpacked(kit)
    del files[missing]
    with pytest.raises(Rejected, match=f"lacks {missing}"):
        join(packed(tmp_path / "kit.zip", files), tmp_path / "site")


def test_a_changed_file_is_found_out_with_and_without_a_changed_list(kit: Path, tmp_path: Path) -> None:
    files = unpacked(kit)
    files["federation.yaml"] = files["federation.yaml"].replace(b"127.0.0.1", b"127.6.6.6")
    with pytest.raises(Rejected, match="the kit was changed"):
        join(packed(tmp_path / "kit.zip", files), tmp_path / "site")
    with pytest.raises(Rejected, match="root did not sign this kit"):
        join(packed(tmp_path / "kit.zip", relisted(files)), tmp_path / "site")
    for change in ({"site": "Beta"}, {"made": 1 << 40}, {"signature": "0" * 128}):
        with pytest.raises(Rejected, match="root did not sign this kit"):
            join(packed(tmp_path / "kit.zip", relisted(unpacked(kit), **change)), tmp_path / "site")
    for change in ({"version": 2}, {"extra": 1}, {"site": "../x"}, {"files": 3}, {"made": -1}):
        with pytest.raises(Rejected, match=r"kit\.json is not of the form"):
            join(packed(tmp_path / "kit.zip", {**unpacked(kit), **_manifest(kit, change)}), tmp_path / "site")


def _manifest(kit: Path, change: dict[str, Any]) -> dict[str, bytes]:
    import json

    return {"kit.json": json.dumps({**json.loads(unpacked(kit)["kit.json"]), **change}).encode()}


def test_a_thief_of_a_kit_cannot_turn_a_site_to_another_coordinator(fed: Path, tmp_path: Path) -> None:
    """The name and the root's public key are in every kit; a new kit with them is still one that the root signs."""
    join(fed / "kits" / "Alpha.zip", tmp_path / "site")
    before = tree(tmp_path / "site")
    forged = unpacked(fed / "kits" / "Alpha.zip")
    make_authority(tmp_path / "evil", "stroke")
    issue(tmp_path / "evil", tmp_path / "evil" / "site", "Alpha")
    for name in ("ca.crt", "own.crt", "own.key"):
        forged[f"certificates/{name}"] = (tmp_path / "evil" / "site" / name).read_bytes()
    with pytest.raises(Rejected, match="root did not sign"):
        join(packed(tmp_path / "kit.zip", relisted(forged)), tmp_path / "site")
    assert tree(tmp_path / "site") == before


# Certificates -----------------------------------------------------------------------------------------------------


def _kit_with(fed: Path, path: Path, name: str = "Alpha", **files: bytes) -> Path:
    """A kit that the root signs, with some certificates of its own."""
    found = {key: data for key, data in unpacked(fed / "kits" / "Alpha.zip").items() if key != "kit.json"}
    found |= {f"certificates/{key.replace('_', '.')}": data for key, data in files.items()}
    root = read_key(CoordinatorFolder(fed).authority / "root.key")
    write_kit(path, "stroke", name, 1, found, root)
    return path


def test_an_expired_certificate_is_refused(fed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_ago = datetime.now(UTC).replace(microsecond=0) - timedelta(days=10)
    issue(fed / "root", tmp_path / "old", "Alpha")
    monkeypatch.setattr(certificates, "_now", lambda: long_ago)
    invite(fed, "Alpha", days=3)
    said = refused("site", "join", fed / "kits" / "Alpha.zip", "--folder", tmp_path / "site")
    assert "expired on" in said
    assert "new kit" in said
    assert not (tmp_path / "site").exists()


def test_certificates_that_do_not_fit_are_refused(fed: Path, tmp_path: Path) -> None:
    issue(fed / "root", tmp_path / "other", "Alpha")
    swapped = _kit_with(fed, tmp_path / "swapped.zip", own_key=(tmp_path / "other" / "own.key").read_bytes())
    with pytest.raises(WardroundError, match="key does not belong"):
        join(swapped, tmp_path / "site")
    with pytest.raises(Rejected, match="for another site than the kit"):
        join(_kit_with(fed, tmp_path / "named.zip", "Beta"), tmp_path / "site")
    make_authority(tmp_path / "ca", "other")
    foreign = _kit_with(fed, tmp_path / "foreign.zip", ca_crt=(tmp_path / "ca" / "ca.crt").read_bytes())
    with pytest.raises(WardroundError, match="another federation's authority"):
        join(foreign, tmp_path / "site")
    with pytest.raises(WardroundError, match="holds no certificate"):
        join(_kit_with(fed, tmp_path / "none.zip", own_crt=b"hello"), tmp_path / "site")
    assert not (tmp_path / "site").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".joining")]


def test_a_kit_of_nvflare_is_unpacked_with_its_folders(tmp_path: Path) -> None:
    fed = tmp_path / "fed"
    make_authority(fed / "root", "stroke")
    issue(fed / "root", fed / "kit", "Alpha")
    root = make_key(fed / "root" / "root.key")
    federation = FEDERATION.model_copy(update={"carrier": "nvflare", "root_key": root.public.hex()})
    save_federation(federation, fed / "federation.yaml")
    files = {f"certificates/{name}": (fed / "kit" / name).read_bytes() for name in os.listdir(fed / "kit")}
    files |= {"federation.yaml": (fed / "federation.yaml").read_bytes(), "README.txt": b""}
    files |= {"nvflare/startup/client.key": b"k", "nvflare/local/resources.json": b"{}", "nvflare/readme.txt": b""}
    write_kit(tmp_path / "kit.zip", "stroke", "Alpha", 1, files, root)
    folder = join(tmp_path / "kit.zip", tmp_path / "site").folder
    assert (folder.nvflare / "transfer").is_dir()
    assert (folder.nvflare / "local" / "resources.json").read_bytes() == b"{}"
    assert stat.S_IMODE((folder.nvflare / "startup" / "client.key").stat().st_mode) == 0o600

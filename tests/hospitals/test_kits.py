"""Standing a federation up: made, hospitals invited and admitted, and the state of it all in one table."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hospitals.stands import FEDERATION, ok, refused, run, stand_up, tree, unpacked
from wardround.errors import MissingExtra, Rejected, WardroundError
from wardround.hospitals.certificates import check_certificates, issue, read_certificate
from wardround.hospitals.federation import load_federation
from wardround.hospitals.folders import CoordinatorFolder
from wardround.hospitals.keys import fingerprint, read_key
from wardround.hospitals.membership import kits
from wardround.hospitals.membership.joining import join
from wardround.hospitals.membership.kit_archive import read_kit
from wardround.hospitals.membership.kits import admit, checked_name, init, invite
from wardround.hospitals.membership.overview import overview
from wardround.hospitals.roster import SignedRoster
from wardround.hospitals.site.running import held
from wardround.protection.identity import Identity

A, B = Identity(b"a" * 32).public, Identity(b"b" * 32).public


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_up(tmp_path_factory.mktemp("made"), "stroke", "Alpha")


@pytest.fixture
def fed(made: Path, tmp_path: Path) -> Path:
    """A federation with one invited site, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "fed"))


def test_init_makes_all_of_a_federation_and_says_what_stays_offline(tmp_path: Path) -> None:
    said = ok(
        "federation", "init", tmp_path / "fed", "--name", "stroke", "--host", "flare.example.org", "--port", 443,
        "--carrier", "https", "--systemd",
    )  # fmt: skip
    folder = CoordinatorFolder(tmp_path / "fed")
    federation = load_federation(folder.federation)
    assert (federation.name, federation.host, federation.port) == ("stroke", "flare.example.org", 443)
    root = read_key(folder.authority / "root.key")
    assert federation.root_key == root.public.hex()
    assert check_certificates(folder.certificates).name == "coordinator"
    roster = SignedRoster.load(folder.roster)
    roster.verify(root.public)
    assert (roster.serial, roster.keys) == (0, {})
    assert fingerprint(root.public) in said
    assert f"Keep offline: {folder.authority}" in said
    assert "sudo cp" in said
    assert (folder.root / "wardround-federation-stroke.service").is_file()
    for name in ("root/root.key", "root/ca.key", "certificates/own.key"):
        assert stat.S_IMODE((folder.root / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700


def test_the_roots_keys_may_lie_elsewhere(tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    fed = tmp_path / "fed"
    options = ["--name", "stroke", "--host", "h.example", "--carrier", "https", "--root", stick]
    assert f"Keep offline: {stick}" in ok("federation", "init", fed, *options)
    assert not (fed / "root").exists()
    assert sorted(path.name for path in stick.iterdir()) == ["ca.crt", "ca.key", "root.key"]
    assert "not there: put in the medium" in refused("federation", "invite", fed, "Alpha")
    ok("federation", "invite", fed, "Alpha", "--root", stick)
    assert "not there: put in the medium" in refused("federation", "admit", fed, "Alpha", A.hex())
    ok("federation", "admit", fed, "Alpha", A.hex(), "--root", stick)
    other = stand_up(tmp_path, "heart")
    assert "of another federation" in refused("federation", "invite", fed, "Beta", "--root", other / "root")
    assert "Alpha" in ok("federation", "status", fed)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--name", "Stroke!", "--host", "h"], "name: must match"),
        (["--name", "stroke", "--host", "no host"], "host: must match"),
    ],
)
def test_init_refuses_what_no_federation_is_called(options: list[str], why: str, tmp_path: Path) -> None:
    assert why in refused("federation", "init", tmp_path / "fed", *options, "--carrier", "https")
    assert not (tmp_path / "fed").exists()


def test_init_overwrites_nothing_and_leaves_nothing_behind(
    fed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(fed)
    with pytest.raises(WardroundError, match="in a new one"):
        init(fed, FEDERATION)
    stick = tmp_path / "stick"
    stick.mkdir()
    (stick / "other").write_text("x")
    with pytest.raises(WardroundError, match="in a new one"):
        init(tmp_path / "new", FEDERATION, stick)
    assert tree(fed) == before

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(kits, "save_federation", full)
    for folder in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(OSError, match="No space"):
            init(folder, FEDERATION, tmp_path / "keys")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "fed", "stick"]
    assert not list((tmp_path / "empty").iterdir())


def test_nvflare_is_asked_for_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kits, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="hospitals"):
        init(tmp_path / "fed", FEDERATION.model_copy(update={"carrier": "nvflare"}))
    assert not (tmp_path / "fed").exists()


def test_kits_hold_what_nvflares_provisioning_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def provision(folder: CoordinatorFolder, federation: object, authority: Path, site: str | None) -> Path:
        asked.append(site)
        assert (authority / "ca.key").is_file()
        kit = folder.nvflare / (site or "server")
        (kit / "startup").mkdir(parents=True)
        (kit / "startup" / "fed_client.json").write_text("{}")
        (kit / "readme.txt").write_text("hello")
        issue(authority, kit / "made", site or "coordinator", days=90)
        (kit / "made" / "own.crt").rename(kit / "startup" / ("client.crt" if site else "server.crt"))
        shutil.rmtree(kit / "made")
        return kit

    monkeypatch.setattr(kits, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(kits, "_provision", lambda: provision)
    init(tmp_path / "fed", FEDERATION.model_copy(update={"carrier": "nvflare"}))
    kit = read_kit(invite(tmp_path / "fed", "Alpha").kit)
    assert asked == [None, "Alpha"]
    assert kit.files["nvflare/startup/fed_client.json"] == b"{}"
    assert kit.files["nvflare/readme.txt"] == b"hello"
    # What ends first is what is said, of the site and of the coordinator.
    assert kit.files["nvflare/startup/client.crt"] == (tmp_path / "fed" / "kits" / "Alpha.crt").read_bytes()
    notices = overview(tmp_path / "fed", datetime.now(UTC) + timedelta(days=80)).notices
    assert [notice.text.partition(":")[0] for notice in notices] == ["Alpha", "coordinator"]
    assert not (tmp_path / "fed" / "nvflare" / "Alpha").exists()
    with pytest.raises(WardroundError, match="NVFlare takes names"):
        invite(tmp_path / "fed", "Ärzte")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_site_joins_with_what_nvflare_itself_makes(tmp_path: Path) -> None:
    pytest.importorskip("nvflare", reason="NVFlare is not installed")
    pytest.importorskip("wardround.hospitals.nvflare.provision")
    fed = tmp_path / "fed"
    init(fed, FEDERATION.model_copy(update={"carrier": "nvflare"}))
    joined = join(invite(fed, "Alpha").kit, tmp_path / "site")
    startup = joined.folder.nvflare / "startup"
    assert read_certificate(startup / "client.crt").name == "Alpha"
    assert (startup / "rootCA.pem").read_bytes() == (fed / "root" / "ca.crt").read_bytes()
    # No second copy of the site's key stays at the coordinator.
    key = (startup / "client.key").read_bytes()
    assert not any(key in data for name, data in tree(fed).items() if not name.endswith(".zip"))
    before = tree(joined.folder.root)
    assert join(invite(fed, "Alpha").kit, tmp_path / "site").renewed
    assert tree(joined.folder.root)["nvflare/startup/client.key"] != before["nvflare/startup/client.key"]


def test_a_kit_holds_the_sites_certificate_and_no_key_of_the_root(fed: Path, tmp_path: Path) -> None:
    path = fed / "kits" / "Alpha.zip"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kit = read_kit(path)
    assert (kit.site, kit.federation) == ("Alpha", load_federation(fed / "federation.yaml"))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "kit")
    certificate = check_certificates(tmp_path / "kit" / "certificates")
    assert certificate.name == "Alpha"
    assert certificate == read_certificate(fed / "kits" / "Alpha.crt")
    secrets = [(fed / "root" / name).read_bytes() for name in ("ca.key", "root.key")]
    assert not any(secret.strip() in data for secret in secrets for data in unpacked(path).values())
    assert "443" in kit.files["README.txt"].decode()


def test_inviting_again_renews(fed: Path) -> None:
    before = read_kit(fed / "kits" / "Alpha.zip")
    said = ok("federation", "invite", fed, "Alpha", "--days", 20)
    assert "Renewed kit of Alpha" in said
    after = read_kit(fed / "kits" / "Alpha.zip")
    assert after.files["certificates/own.crt"] != before.files["certificates/own.crt"]
    assert after.made >= before.made
    assert SignedRoster.load(fed / "roster.json").serial == 0


@pytest.mark.parametrize("site", ["../x", "a/b", "", "1st", "x" * 33, "mean", "coordinator", "a b", ".", "alpha"])
def test_a_name_that_no_site_can_have_is_refused(site: str, made: Path) -> None:
    before = tree(made)
    assert "error" in refused("federation", "invite", made, "--", site)
    assert tree(made) == before


def test_names_of_other_scripts_are_names(fed: Path) -> None:
    assert checked_name("Universita\u0308t", FEDERATION, ()) == "Universit\u00e4t"
    assert invite(fed, "東京病院").certificate.name == "東京病院"


def test_admitting_signs_the_list_and_gives_words_to_compare(fed: Path) -> None:
    ok("federation", "invite", fed, "Beta")
    said = ok("federation", "admit", fed, "Alpha", " ".join(A.hex()[n : n + 8] for n in range(0, 64, 8)))
    assert fingerprint(A) in said
    assert "serial 1" in said
    roster = SignedRoster.load(fed / "roster.json")
    roster.verify(bytes.fromhex(load_federation(fed / "federation.yaml").root_key))
    assert roster.keys == {"Alpha": A}
    assert "already" in ok("federation", "admit", fed, "Alpha", A.hex())
    assert "--replace" in refused("federation", "admit", fed, "Alpha", B.hex())
    assert "one key" in refused("federation", "admit", fed, "Beta", A.hex())
    assert "approved again" in ok("federation", "admit", fed, "Alpha", B.hex(), "--replace")
    assert SignedRoster.load(fed / "roster.json").serial == 2


def test_admitting_refuses_what_is_no_key_of_an_invited_site(fed: Path) -> None:
    assert "64 digits" in refused("federation", "admit", fed, "Alpha", A.hex()[:-1])
    assert "was not invited; invited are: Alpha" in refused("federation", "admit", fed, "Alfa", A.hex())
    root_key = load_federation(fed / "federation.yaml").root_key
    assert "own root key" in refused("federation", "admit", fed, "Alpha", root_key)
    assert SignedRoster.load(fed / "roster.json").serial == 0


def test_a_list_that_the_root_did_not_sign_is_not_gone_on_with(fed: Path) -> None:
    path = fed / "roster.json"
    SignedRoster.sign("stroke", 5, {"Alpha": B}, Identity(b"x" * 32)).save(path)
    with pytest.raises(Rejected, match="root did not sign"):
        admit(fed, "Alpha", A)
    result = run("federation", "status", fed)
    assert result.exit_code == 1
    assert "root did not sign" in result.stderr


def test_commands_on_no_federation_say_so(tmp_path: Path) -> None:
    for arguments in (("status",), ("invite", "Alpha"), ("admit", "Alpha", A.hex()), ("renew",)):
        command, *rest = arguments
        assert "holds no federation" in refused("federation", command, tmp_path, *rest)


def test_status_tells_certificates_that_end(fed: Path) -> None:
    assert "365 days left" in ok("federation", "status", fed)
    now = datetime.now(UTC)
    assert not overview(fed, now).notices
    for days, words, urgent in ((340, "within 30 days", False), (359, "within 7 days", True), (366, "ended on", True)):
        notices = overview(fed, now + timedelta(days=days)).notices
        assert [notice.urgent for notice in notices] == [urgent, urgent]
        assert words in notices[0].text
        assert notices[0].text.startswith("Alpha: the certificate")
        assert "federation renew" in notices[1].text
    issue(fed / "root", fed / "certificates", "coordinator", host="127.0.0.1", days=5)
    result = run("federation", "status", fed)
    assert result.exit_code == 1
    assert "coordinator: the certificate ends within 7 days" in result.stderr
    ok("federation", "renew", fed)
    assert ok("federation", "status", fed)


def test_status_shows_what_the_service_said(fed: Path) -> None:
    admit(fed, "Alpha", A)
    for site in ("Beta", "Gamma"):
        shutil.copy(fed / "kits" / "Alpha.crt", fed / "kits" / f"{site}.crt")
    assert "The service was not started" in ok("federation", "status", fed)
    sites = [
        {"name": "Alpha", "state": "present", "seen": time.time(), "waiting": 0},
        {"name": "Beta", "state": "lost", "seen": 0.0, "waiting": 2},
        {"name": "Gamma", "state": "never", "seen": None, "waiting": 0},
    ]
    studies = [{"name": "lesions", "state": "asking", "reason": "Beta has not decided"}]
    live = {"process": {"state": "running"}, "sites": sites, "studies": studies}
    (fed / "status.json").write_text(json.dumps(live))
    with held(fed / "coordinator.lock"):
        said = ok("federation", "status", fed)
    rows = {line.split()[0]: line for line in said.splitlines() if line.split()}
    assert "The service runs" in said
    assert rows["Alpha"].split()[:4] == ["Alpha", "yes", "yes", "present"]
    assert "lost since 1970-01-01" in rows["Beta"]
    assert "not yet" in rows["Gamma"]
    assert "Study lesions: asking (Beta has not decided)" in said
    # A service that was killed could not say that it ended.
    said = ok("federation", "status", fed)
    assert "The service is not running" in said
    assert "lesions: not at work, for the service is not running (before: asking)" in " ".join(said.split())
    os.utime(fed / "status.json", (0, 0))
    with held(fed / "coordinator.lock"):
        assert "The service hangs: it wrote nothing since 1970" in " ".join(ok("federation", "status", fed).split())
    assert "is not running; this is as of 1970" in ok("federation", "status", fed)
    for text in ("[]", "{", '{"sites": 3, "studies": [4]}', ""):
        (fed / "status.json").write_text(text)
        assert "Alpha" in ok("federation", "status", fed)

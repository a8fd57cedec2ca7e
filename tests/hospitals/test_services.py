"""Units of systemd: systemd itself accepts them, whatever the folder is called, and the process gets no rights."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from wardround.errors import WardroundError
from wardround.hospitals.membership import services
from wardround.hospitals.membership.services import Service, coordinator_service, site_service

FOLDERS = ["plain", "with space", "100%h $HOME", 'it\'s "quoted"', "Universität"]


def _both(folder: Path) -> list[Service]:
    return [coordinator_service(folder, "stroke", "someone"), site_service(folder, "stroke", "Alpha", "someone")]


@pytest.mark.parametrize("name", FOLDERS)
def test_systemd_accepts_the_units(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    folder = tmp_path / name
    folder.mkdir()
    for service in _both(folder):
        path = service.write(folder if name == "plain" else tmp_path)
        done = subprocess.run(
            ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        # What other units of this machine lack is said there, too.
        assert not re.search(rf"{service.name}.*(ignor|unknown|fatal|not absolute|invalid|bad)", done.stderr, re.I)
        assert done.returncode == 0, done.stderr


def test_a_unit_gives_no_rights_and_one_folder(tmp_path: Path) -> None:
    for service in _both(tmp_path):
        lines = service.text.splitlines()
        for line in (
            "NoNewPrivileges=yes",
            "ProtectSystem=strict",
            "PrivateTmp=yes",
            "Restart=always",
            "CapabilityBoundingSet=",
            "User=someone",
            f"ReadWritePaths={tmp_path}",
        ):
            assert line in lines
        assert service.install in service.text
    coordinator, site = _both(tmp_path)
    for name in ("root", "kits"):
        assert f"InaccessiblePaths=-{tmp_path / name}\n" in coordinator.text
    assert "InaccessiblePaths" not in site.text
    assert f"-m wardround federation start {tmp_path}" in coordinator.text
    assert f"-m wardround site start {tmp_path}" in site.text


def test_systemd_replaces_nothing_in_a_folders_name(tmp_path: Path) -> None:
    text = site_service(tmp_path / "100%h $HOME", "stroke", "Alpha", "someone").text
    assert f'site start "{tmp_path}/100%%h $$HOME"' in text
    assert f"WorkingDirectory={tmp_path}/100%%h $HOME" in text
    with pytest.raises(WardroundError, match="line breaks"):
        site_service(tmp_path / "a\nExecStartPre=evil", "stroke", "Alpha")


def test_no_service_runs_as_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services.getpass, "getuser", lambda: "root")
    service = site_service(tmp_path, "stroke", "Alpha")
    assert "User=wardround\n" in service.text
    assert "useradd --system wardround" in service.install
    monkeypatch.setattr(services.getpass, "getuser", lambda: "ward")
    service = site_service(tmp_path, "stroke", "Alpha")
    assert "User=ward\n" in service.text
    assert "useradd" not in service.install

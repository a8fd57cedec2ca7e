"""A federation over HTTPS with one invited site, and its commands as a person gives them."""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from wardround.cli import app
from wardround.hospitals.federation import Federation
from wardround.hospitals.membership.kits import init, invite

FEDERATION = Federation(name="stroke", carrier="https", host="127.0.0.1", port=8443, root_key="0" * 64)


def run(*arguments: object) -> Result:
    """A command's result."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    """What a command that must succeed prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    """What a command that must fail says: exit code 2, an error, nothing on stdout, no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def stand_up(folder: Path, name: str = "stroke", *sites: str) -> Path:
    """Make a federation and kits for some sites; its folder."""
    init(folder / name, FEDERATION.model_copy(update={"name": name}))
    for site in sites:
        invite(folder / name, site)
    return folder / name


def unpacked(kit: Path) -> dict[str, bytes]:
    """The files of a kit."""
    with zipfile.ZipFile(kit) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(path: Path, files: Mapping[str, bytes], *, mode: int = stat.S_IFREG | 0o600) -> Path:
    """An archive of these files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path


def relisted(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """The files with a list that names their hashes, under the signature of before."""
    manifest = json.loads(files["kit.json"])
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "kit.json"}
    return {**files, "kit.json": json.dumps({**manifest, "files": hashes, **changes}).encode()}


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their names in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

"""Files of the containers: pinned, without root, without anything from an address; built where this machine can."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "containers"
FILES = sorted(FOLDER.glob("Containerfile.*"))
# What the health checks look for, and where a command says it.
SAID = {
    "site": ("running, number", "cli/site_agent.py"),
    "coordinator": ("The service runs", "hospitals/membership/overview.py"),
}


def instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions of a file in their order, long ones in one line."""
    text = re.sub(r"^#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def base(file: Path) -> str:
    """The image that a file begins from; all of its stages begin from one."""
    given = instructions(file)
    values = dict(rest.split("=", 1) for word, rest in given if word == "ARG")
    found = {rest.split(" AS ")[0] for word, rest in given if word == "FROM"}
    assert len(found) == 1
    return re.sub(r"\$\{(\w+)\}", lambda name: values[name[1]], found.pop())


def test_there_is_one_for_each_party() -> None:
    assert [file.suffix for file in FILES] == [".coordinator", ".site"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix[1:])
def test_it_is_pinned_and_takes_nothing_from_an_address(file: Path) -> None:
    given = instructions(file)
    assert re.fullmatch(r"docker\.io/library/python:\d+\.\d+\.\d+-slim-\w+", base(file))
    assert "ADD" not in {word for word, _ in given}
    for word, rest in given:
        if word == "COPY" and not rest.startswith("--from="):
            assert all((ROOT / name).exists() for name in rest.split()[:-1]), rest
        if word == "RUN":
            assert not re.search(r"\b(?:curl|wget|git|sudo)\b", rest)
            for command in re.findall(r"pip install[^&]*", rest):
                assert "--constraint constraints.txt" in command
    assert (ROOT / ".dockerignore").read_text(encoding="utf-8").startswith("*\n")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix[1:])
def test_its_process_is_not_root_and_says_whether_it_is_well(file: Path) -> None:
    given = instructions(file)
    users = [rest for word, rest in given if word == "USER"]
    assert users == ["10001:10001"]
    after = [word for word, _ in given[given.index(("USER", users[0])) :]]
    assert "RUN" not in after
    text, source = SAID[file.suffix[1:]]
    (check,) = [rest for word, rest in given if word == "HEALTHCHECK"]
    assert f'grep -q "{text}"' in check
    assert text in (ROOT / "src/wardround" / source).read_text(encoding="utf-8")
    ports = [rest for word, rest in given if word == "EXPOSE"]
    assert ports == (["8443"] if file.suffix == ".coordinator" else [])


def test_the_example_gives_each_only_what_it_needs() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["user"] == "10001:10001"
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert (FOLDER.parent / service["build"]["dockerfile"]).is_file()
    assert services["coordinator"]["ports"] == ["8443:8443"]
    assert "ports" not in services["site"]
    assert [volume for volume in services["site"]["volumes"] if ":/data" in volume] == ["/srv/mri:/data:ro"]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix[1:])
def test_it_is_built_and_answers(file: Path) -> None:
    builder = _builder()
    if builder is None:
        pytest.skip("no builder of containers is at work here (podman, docker)")
    if subprocess.run([builder, "pull", base(file)], capture_output=True, timeout=300).returncode:
        pytest.skip("the image that containers begin from cannot be fetched here")
    tag = f"wardround-test-{file.suffix[1:]}"
    subprocess.run([builder, "build", "--file", file, "--tag", tag, ROOT], check=True, timeout=3600)
    hardened = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--network", "none"]
    said = subprocess.run(
        [builder, "run", "--rm", *hardened, tag, "--version"], check=True, capture_output=True, text=True, timeout=300
    )
    assert re.search(r"\d+\.\d+\.\d+", said.stdout)


def _builder() -> str | None:
    """A builder whose service answers."""
    for name in ("podman", "docker"):
        if shutil.which(name) and not subprocess.run([name, "info"], capture_output=True, timeout=60).returncode:
            return name
    return None

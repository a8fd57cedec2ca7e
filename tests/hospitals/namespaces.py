"""A network of a test's own, where root can make one: a hospital behind a cable that is pulled."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest

Down = Callable[[], AbstractContextManager[None]]


@contextmanager
def link() -> Iterator[tuple[str, Sequence[str], Down]]:
    """A network namespace on a line to this one.

    This one's address there, the words before a command that is to run inside, and what takes the line down for a
    while. Skips the test, saying so, where none can be made.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace needs root and the command ip")
    mark = secrets.token_hex(3)
    name, near, far = f"ward-{mark}", f"w{mark}n", f"w{mark}f"
    net = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
    commands = (
        f"netns add {name}",
        f"link add {near} type veth peer name {far} netns {name}",
        f"addr add {net}.1/30 dev {near}",
        f"link set {near} up",
        f"-n {name} addr add {net}.2/30 dev {far}",
        f"-n {name} link set {far} up",
        f"-n {name} link set lo up",
    )
    try:
        for words in commands:
            if said := _ip(words):
                pytest.skip(f"no network namespace can be made here: {said}")

        @contextmanager
        def down() -> Iterator[None]:
            _ip(f"link set {near} down")
            try:
                yield
            finally:
                _ip(f"link set {near} up")

        yield f"{net}.1", ("ip", "netns", "exec", name), down
    finally:
        _ip(f"link del {near}")
        _ip(f"netns del {name}")


def _ip(words: str) -> str:
    """Run the command; what it complains of."""
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    return done.stderr.strip() or "it failed" if done.returncode else ""

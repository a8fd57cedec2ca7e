"""What it takes to add something: the source files that real additions touched, from the history.

A commit that adds a method, model, reader or task says so in a line of its own, `Adds: method`; commits with the same
line after the same name (`Adds: task classification`) count as one. Files are those under src/; tests, docs and
examples do not count. With --before, the lines of source of that commit stand beside today's.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

from common import arguments, conditions, finish, table

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("method", "model", "reader", "task")
# The last commit of the house before it was redrawn: the one before its rooms were parted.
REDRAWN = "Keep the coordinator's rooms from what opens a site's data, stores and ledgers"
_ADDS = re.compile(r"^Adds: (\w+)(?: (.+))?$", re.MULTILINE)


def git(*words: str) -> str:
    """What git says."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout


def additions() -> dict[tuple[str, str], set[str]]:
    """The files under src/ that each addition touched, by its kind and name (the commit's first line without one)."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for commit in git("log", "--no-merges", "--format=%H", "--grep=^Adds: ").split():
        message = git("log", "-1", "--format=%B", commit)
        files = git("show", "--no-renames", "--format=", "--name-only", commit, "--", "src").split("\n")
        for kind, name in _ADDS.findall(message):
            found[kind, name or message.splitlines()[0]] |= {file for file in files if file}
    return found


def lines(commit: str) -> int:
    """Lines of source at a commit."""
    files = [f for f in git("ls-tree", "-r", "--name-only", commit, "--", "src").split("\n") if f.endswith(".py")]
    return sum(git("show", f"{commit}:{file}").count("\n") for file in files)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--before", help="a commit to compare the lines of source with")
    options = parser.parse_args()
    state = conditions(repeats=1, quick=options.quick)
    found = additions()
    table(
        ["kind", "files", "what"],
        [[kind, len(files), name] for (kind, name), files in sorted(found.items())],
    )
    redrawn = git("log", "--format=%H", "--fixed-strings", f"--grep={REDRAWN}").split()
    before = options.before or (f"{redrawn[-1]}^" if redrawn else None)
    # The easiest and the hardest of each kind: the first of a kind may have brought what all later ones share.
    counts = {kind: sorted(len(files) for (of, _), files in found.items() if of == kind) for kind in KINDS}
    finish(
        {
            **{f"files_for_{kind}": of_kind[0] if of_kind else None for kind, of_kind in counts.items()},
            **{f"most_files_for_{kind}": of_kind[-1] if of_kind else None for kind, of_kind in counts.items()},
            "source_lines_before": lines(before) if before else None,
            "source_lines": lines("HEAD"),
            "conditions": state,
        }
    )


if __name__ == "__main__":
    main()

"""Files that are small and come to very much: refused with one clear error, before anything is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from wardround.errors import DataError, StudyError
from wardround.federation.release import FORMAT, study_of
from wardround.study.load import load_study
from wardround.study.sites import load_sites
from wardround.study.yaml_text import MAX_BYTES, MAX_VALUES, _Loader, parse_yaml
from wardround.wire.canonical import MAX_DEPTH

EXAMPLES = Path(__file__).parents[2] / "examples"
HEAD = "name: gift\nsites: {A: {}}\n"
# Ten levels of ten: 10^10 values in half a kilobyte.
BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10 if n else ['x'] * 10)}]\n" for n in range(10))
# Merged keys are copied, so this one grows while it is read.
MERGED = "m0: &m0 {x: 1}\n" + "".join(
    f"m{n}: &m{n} {{k{n}: 0, <<: [{', '.join([f'*m{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
)
# One place of a dictionary for all of them.
COLLIDING = ", ".join(f"{number * (2**61 - 1)}: 1" for number in range(1, 4))
PLAIN_KEY = "a key that is no text and longer than 15 characters"
CASES: dict[str, tuple[str, str]] = {
    "aliases": (HEAD + BOMB, "more than 32,000 values, with every alias written out"),
    "merged keys": (HEAD + MERGED, "more than 32,000 values"),
    "brackets": (HEAD + "task: " + "[" * 20_000, "nested deeper than 16 levels"),
    "braces": (HEAD + "task: " + "{a: " * 5_000, "nested deeper than 16 levels"),
    "indents": ("\n".join(" " * n + "a:" for n in range(500)), "nested deeper than 16 levels"),
    "dashes": ("task: \n" + "- " * 5_000 + "x", "nested deeper than 16 levels"),
    "levels by aliases": (
        HEAD + "a: &a [[[[[[[[x]]]]]]]]\nb: &b [[[[[*a]]]]]\nc: [[[[*b]]]]\n",
        "nested deeper than 16 levels",
    ),
    "itself": (HEAD + "task: &a [*a]\n", "an alias stands inside of what it repeats"),
    "itself in a key": (HEAD + "task: &a {b: {c: *a}}\n", "an alias stands inside of what it repeats"),
    "base 60": (HEAD + "seed: 1" + ":1" * 5_000, "a whole number of more than 64 characters"),
    "colliding keys": (HEAD + f"task: {{{COLLIDING}}}\n", PLAIN_KEY),
    "colliding keys in a block": (HEAD + "task:\n  " + COLLIDING.replace(", ", "\n  "), PLAIN_KEY),
    "colliding keys of a set": (HEAD + f"task: !!set {{{COLLIDING}}}\n", PLAIN_KEY),
    "colliding keys merged": (HEAD + f"task: {{<<: {{{COLLIDING}}}}}\n", PLAIN_KEY),
    "long": (HEAD + "#" * MAX_BYTES, "longer than 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("read", [load_study, load_sites])
def test_a_bomb_is_one_error_with_its_place(tmp_path: Path, case: str, read: Callable[[Path], Any]) -> None:
    text, expected = CASES[case]
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match=expected) as caught:
        read(path)
    assert len(str(caught.value)) < 400
    if case != "long":
        assert "(line " in str(caught.value)


@pytest.mark.parametrize("opened", ["[", "{", "[[{", "{a: ", "- [", "? ["])
def test_open_brackets_are_not_read_to_their_end(monkeypatch: pytest.MonkeyPatch, opened: str) -> None:
    """The library reads a thousand characters ahead, and looks at all open brackets for each."""
    steps = []
    fetch = _Loader.fetch_more_tokens
    monkeypatch.setattr(_Loader, "fetch_more_tokens", lambda self: (steps.append(1), fetch(self))[1])
    with pytest.raises(StudyError, match="nested deeper than 16 levels"):
        parse_yaml(opened * (200_000 // len(opened)), "text")
    assert len(steps) < 4 * MAX_DEPTH


def test_brackets_in_texts_and_comments_open_nothing() -> None:
    many = "[" * (MAX_DEPTH + 1)
    text = f"a: \"{many}\" # {many}\nb: x{many}\nc: |\n  {many}\nd: '{many}'\n"
    assert parse_yaml(text, "text") == {"a": many, "b": f"x{many}", "c": f"{many}\n", "d": many}
    assert parse_yaml("123456789012345: 1\n2024-05-01: 2\n1.5: 3\n", "text").keys() >= {123456789012345, 1.5}


def test_a_study_of_500_sites_has_fewer_values_than_are_read() -> None:
    def count(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + sum(1 + count(part) for part in value.values())
        return 1 + sum(map(count, value)) if isinstance(value, list) else 1

    study = load_study(EXAMPLES / "luad-ct.yaml").model_dump(mode="json")
    site = max(1 + count(site) for site in study["sites"].values())
    assert 500 * site + count(study) < MAX_VALUES


def test_values_are_counted_without_aliases_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wardround.study.yaml_text.MAX_VALUES", 1_000)
    assert len(parse_yaml("[" + "1," * 998 + "]", "text")) == 998
    with pytest.raises(StudyError, match="more than 1,000 values"):
        parse_yaml("[" + "1," * 1_000 + "]", "text")


def test_overrides_and_mappings_are_held_to_the_same(tmp_path: Path) -> None:
    plain = {"name": "gift", "sites": {"A": {}}}
    with pytest.raises(StudyError, match="value of override task is not valid YAML: it is nested deeper"):
        load_study(plain, ["task=" + "[" * 5_000])
    with pytest.raises(StudyError, match=r"not of the form a\.b\.c=value"):
        load_study(plain, [".".join("a" * 5_000) + "=1"])
    deep: Any = 1
    for _ in range(5_000):
        deep = {"a": deep}
    with pytest.raises(StudyError, match="nested deeper than 16"):
        load_study({**plain, "task": deep})
    with pytest.raises(StudyError, match="5000 problems") as caught:
        load_study({**plain, **{f"key{n}": 1 for n in range(5_000)}})
    assert len(str(caught.value)) < 50 * 400


def test_aliases_and_depth_that_a_study_may_want_are_read() -> None:
    text = "a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\n"
    assert parse_yaml(text, "text") == {"a": {"x": [1, 2]}, "b": {"x": [1, 2]}, "c": {"x": [1, 2], "y": 3}}
    deep = "[" * MAX_DEPTH + "x" + "]" * MAX_DEPTH
    assert json.dumps(parse_yaml(deep, "text")).count("[") == MAX_DEPTH
    assert parse_yaml("0x" + "f" * 16, "text") == 2**64 - 1


def test_a_released_model_whose_study_is_a_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for study in ("[" * 100_000, '{"name": ' + '{"a":' * 50 + "1" + "}" * 51, "1" * 5_000):
        save_file({}, path, {"format": FORMAT, "study": study})
        with pytest.raises(DataError, match="holds no study that this version"):
            study_of(path, {"study": study})

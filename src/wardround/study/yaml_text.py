"""YAML from people and from elsewhere: read as YAML 1.2 means it, and within bounds that no study reaches.

A few hundred bytes of aliases can stand for 10^9 values, and a few thousand brackets exhaust Python's stack: both are
refused before anything is made of them.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from wardround.errors import StudyError
from wardround.wire.canonical import MAX_DEPTH

# A study of 500 sites, each with every key of a CT scanner of its own, has fewer of both: 28,000 values.
MAX_BYTES = 1 << 20
MAX_VALUES = 32_000
_LONGEST_INTEGER = 64
# Python puts whole numbers that differ by a multiple of 2^61 - 1 in one place of a dictionary: thousands of such keys
# take the square of their number in time. None is so short; the places of texts cannot be foreseen.
_LONGEST_PLAIN_KEY = 15
_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads booleans and floats as YAML 1.2 does.

    YAML 1.1 would read a site called `NO` as false and `lr: 1e-3` as text. Values are counted as if every alias were
    written out, and so are the levels below one another.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0
        self._above = 0
        # Of every finished node: the values in it, and the levels.
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}

    def fetch_flow_collection_start(self, token_class: type[yaml.Token]) -> None:
        """Open a bracket as the library does; it reads a thousand ahead, each slower than the one before."""
        if self.flow_level >= MAX_DEPTH:
            mark: Any = self.get_mark()
            raise yaml.MarkedYAMLError(problem=_DEEP, problem_mark=mark)
        super().fetch_flow_collection_start(token_class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Make a dictionary as the library does, of keys that are text or short."""
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:str" and len(key.value) > _LONGEST_PLAIN_KEY:
                    problem = f"a key that is no text and longer than {_LONGEST_PLAIN_KEY} characters"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node as the library does, within the bounds."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._values
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._sizes:
                raise _refused("an alias stands inside of what it repeats", event)
            values, levels = self._sizes[node]
            self._add(values, levels, event)
            return node
        self._add(1, int(isinstance(event, yaml.CollectionStartEvent)), event)
        self._above += 1
        node = super().compose_node(parent, index)
        self._above -= 1
        assert node is not None
        self._sizes[node] = (self._values - before, self._levels(node))
        return node

    def _add(self, values: int, levels: int, event: yaml.Event) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _refused(f"it comes to more than {MAX_VALUES:,} values, with every alias written out", event)
        if self._above + levels > MAX_DEPTH:
            raise _refused(_DEEP, event)

    def _levels(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 0
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        return 1 + max((self._sizes[part][1] for part in parts), default=0)


def _refused(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = event.start_mark
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    [*"-+0123456789."],
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


def _short_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    # `1:1:1: ...` is a number of base 60 to the library, and takes the square of its length in time.
    if len(node.value) > _LONGEST_INTEGER:
        problem = f"a whole number of more than {_LONGEST_INTEGER} characters"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _short_integer)


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text; `what` names it in errors.

    Raises StudyError for what is no YAML, has a key twice, and goes beyond 16 levels or 32,000 values.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise StudyError(f"the {what} is not valid YAML: {error.problem}{where}", detail=str(error)) from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise StudyError(f"the {what} is not valid YAML", detail=str(error)) from error


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; `what` names the file in errors. Raises StudyError."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StudyError(
            f"the {what} file cannot be read: {error.strerror}; check its path", detail=str(path)
        ) from error
    if len(data) > MAX_BYTES:
        raise StudyError(f"the {what} file is longer than {MAX_BYTES:,} bytes; is it the right file?", detail=str(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StudyError(f"the {what} file is not UTF-8 text; is it the right file?", detail=str(path)) from error
    value = parse_yaml(text, f"{what} file")
    if not isinstance(value, dict):
        raise StudyError(f"the {what} file must hold `key: value` lines; it is empty or a list", detail=str(path))
    return value
